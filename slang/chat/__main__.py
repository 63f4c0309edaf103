"""Run as: python -m slang.chat --help"""

from slang.errors import program

if __name__ == "__main__":
    program("slang.chat.command")
