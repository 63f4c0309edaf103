"""Run as: python -m slang.train --help"""

from slang.errors import program

if __name__ == "__main__":
    program("slang.train.command")
