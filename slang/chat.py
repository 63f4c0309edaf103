"""mlx_lm.chat, which Ctrl-D and Ctrl-C end as q does; by itself it ends in a traceback then.

Run as: python -m slang.chat --model models/tiny-gemma3 --adapter-path adapters/tiny
"""

import sys

from mlx_lm.chat import main as converse


def main() -> int:
    try:
        converse()
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
