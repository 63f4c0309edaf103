from slang.errors import program

if __name__ == "__main__":
    program("slang.models.tiny_gemma.build")
