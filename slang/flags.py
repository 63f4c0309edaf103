"""What a flag of a number may be, for argparse."""

import argparse
import math
from collections.abc import Callable


def number(least: float, most: float = math.inf, whole: bool = False) -> Callable[[str], float]:
    """A reader of numbers from `least` to `most`. NaN and infinity are none.

    It gives an int with `whole`. argparse.ArgumentTypeError says what is wrong, and what to give.
    """
    kind = "whole number" if whole else "number"
    bounds = f"from {least} to {most}" if most < math.inf else f"from {least}"

    def read(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: give a {kind} {bounds}")
        return value

    return read
