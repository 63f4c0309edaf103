"""Run as: python -m slang.export --help"""

from slang.errors import program

if __name__ == "__main__":
    program("slang.export.command")
