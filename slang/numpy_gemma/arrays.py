"""Arrays shared with MLX, and elementwise work in parts that stay in cache."""

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import mlx.core as mx
import numpy as np

BLOCK = 2**17  # entries of an elementwise pass, 512 KB: `gelu_product` makes 16 passes in cache
THREADS = int(os.environ.get("OPENBLAS_NUM_THREADS") or os.cpu_count() or 1)


def view(a: mx.array) -> np.ndarray:
    """The same memory as a numpy array, float32."""
    return np.array(a, copy=False)


def over_rows(work, rows: int, width: int) -> None:
    """Call work(slice) for parts of the rows that stay in cache, on as many threads as products
    have.
    """
    height = max(1, BLOCK // max(width, 1))
    parts = [slice(at, min(at + height, rows)) for at in range(0, rows, height)]
    if THREADS == 1 or len(parts) == 1:
        for part in parts:
            work(part)
    else:
        list(pool().map(work, parts))


@cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, initializer=partial(np.seterr, all="ignore"))


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one: given back and fetched anew, 250 MB a
    step of 16 rows take 0.1 s.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            # M_MMAP_THRESHOLD: below 32 MB, the most there is, memory comes from the heap.
            library.mallopt(-3, 2**25)
            # M_TRIM_THRESHOLD: the heap shrinks when a GB at its end is free.
            library.mallopt(-1, 2**30)
