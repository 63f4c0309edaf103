"""Losses and likeliest tokens; the vocabulary is gone through in parts, and no logits are kept."""

import numpy as np

CHUNK = 2048  # vocabulary entries at a time: 512 KB of logits of 64 answers, which stay in cache
# Below it exponentials are denormal, and products 150 times slower.
LOWEST_EXPONENT = np.float32(-87)


def cross_entropy(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray,
                  slope: bool = False) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """-log softmax(hidden head')[target] of each answer, in nats, and with `slope` its gradient by
    hidden (answers, hidden).

    head is (vocabulary, hidden). It is gone through once, a part at a time, and no logits are kept:
    sums of exponentials and the part of the gradient that they weigh are kept relative to the
    largest logit so far ("online softmax", Milakov and Gimelshein, arXiv 1805.02867). Parts are
    more exact, too: MLX adds up 262,144 exponentials in one float32, which puts a loss of 6.0816 at
    6.0812, and mlx_lm's gradient 9e-3 off.
    """
    answers = len(hidden)
    # OpenBLAS is at its best with 16 columns at a time: 76 answers took 0.59 s, 80 take 0.54.
    across = np.zeros((hidden.shape[1], -(-answers // 16) * 16), np.float32)
    across[:, :answers] = hidden.T
    top = np.full(across.shape[1], -np.inf, np.float32)
    sums = np.zeros(across.shape[1], np.float32)
    mean = np.zeros_like(across)
    for at in range(0, len(head), CHUNK):
        part = head[at : at + CHUNK]
        logits = part @ across
        higher = np.maximum(top, logits.max(axis=0))
        shrink = np.exp(top - higher)
        top = higher
        logits -= top
        np.maximum(logits, LOWEST_EXPONENT, out=logits)
        np.exp(logits, out=logits)
        sums = sums * shrink + np.ones(len(part), np.float32) @ logits
        if slope:
            mean *= shrink
            mean += part.T @ logits
    right = head[targets]
    total = (np.log(sums) + top)[:answers]
    losses = total - np.einsum("ij,ij->i", hidden, right)
    return losses, (mean / sums).T[:answers] - right if slope else None


def likeliest(hidden: np.ndarray, head: np.ndarray) -> np.ndarray:
    """The token with the largest logit after each of hidden (rows, hidden); 0 where none is a
    number.
    """
    best, token = np.full(len(hidden), -np.inf, np.float32), np.zeros(len(hidden), int)
    rows = np.arange(len(hidden))
    for at in range(0, len(head), CHUNK):
        logits = hidden @ head[at : at + CHUNK].T
        here = logits.argmax(axis=1)
        higher = logits[rows, here] > best
        best[higher], token[higher] = logits[rows, here][higher], at + here[higher]
    return token
