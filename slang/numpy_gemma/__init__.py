"""Gemma 3 forward and backward in numpy on a CPU: loss, gradient of a LoRA adapter, greedy answers.

MLX's CPU kernels for everything but products take 13 to 18 ns an entry (exp, sigmoid, max, sums),
numpy's 0.1 to 0.4. So slang/train and slang/evaluate compute with this package, on a CPU, what they
compute with MLX elsewhere. Products are OpenBLAS's, as numpy brings it, with as many threads as
OPENBLAS_NUM_THREADS says. Everything is float32.

Shapes, in all of the package:

    tokens   packed tokens: the common prefix once, then the rows end to end, without padding
    hidden   the model's width, 640 in Gemma 3 270M
    heads    query heads, of `dim` entries each
    groups   key and value heads, of which each serves heads / groups query heads

What goes forward keeps what goes back will need, in `kept`, a list that is taken apart from its
end.
"""

from slang.numpy_gemma.arrays import view
from slang.numpy_gemma.reading import Reading
from slang.numpy_gemma.rows import Batch, Row, common_prefix
from slang.numpy_gemma.step import Step
from slang.numpy_gemma.support import to_float32, why_not

__all__ = ["Batch", "Reading", "Row", "Step", "common_prefix", "to_float32", "view", "why_not"]
