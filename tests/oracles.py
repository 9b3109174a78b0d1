"""Slow, readable float64 NumPy versions of what jaxquant computes, written from the papers and not from its code.

One thing is the code's own: `choose` and `encode` multiply with a rounded reciprocal, as `numerics/affine.py` says, so
that the codes can be compared exactly. `by_division` takes the textbook at its word, and knows where that matters.
"""

import numpy as np


def code_range(bits, narrow_range):
    return -(2 ** (bits - 1)) + int(narrow_range), 2 ** (bits - 1) - 1


def choose(x, bits, symmetric, narrow_range=False, scale_dtype=np.float64):
    """Scale and zero point of one range of numbers, with the roundings that `numerics/affine.py` documents."""
    low, high = code_range(bits, narrow_range)
    smallest, largest = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = max(-smallest, largest) * (2 / (high - low)) if symmetric else (largest - smallest) * (1 / (high - low))
    scale = float(np.asarray(scale).astype(scale_dtype)) or 1.0
    zero = 0 if symmetric else int(np.clip(np.round(low - smallest * (1 / scale)), low, high))
    return scale, zero


def encode(x, scale, zero, bits, narrow_range=False):
    return np.clip(np.round(x * (1 / scale)) + zero, *code_range(bits, narrow_range))


def groups_of(shape, granularity, group_size):
    """Index arrays `[K, N]` of the scale that each entry uses: row in `[G, N]` and column."""
    k, n = shape
    rows = np.arange(k) // (group_size or k)
    columns = np.zeros(n, int) if granularity == "per_tensor" else np.arange(n)
    return np.broadcast_to(rows[:, None], shape), np.broadcast_to(columns, shape)


def rtn(w, bits, symmetric, granularity, group_size=None, narrow_range=False, scale_dtype=np.float64):
    """Codes `[K, N]`, scales and zero points `[G, N]` of rounding to nearest, one range after another."""
    rows, columns = groups_of(w.shape, granularity, group_size)
    scale = np.zeros((rows.max() + 1, columns.max() + 1))
    zero = np.zeros_like(scale)
    for g, c in np.ndindex(scale.shape):
        scale[g, c], zero[g, c] = choose(w[(rows == g) & (columns == c)], bits, symmetric, narrow_range, scale_dtype)
    return encode(w, scale[rows, columns], zero[rows, columns], bits, narrow_range), scale, zero


def by_division(w, bits, symmetric, granularity, group_size=None, narrow_range=False):
    """The textbook's x / S: codes `[K, N]`, scales and zero points `[G, N]`, and how far each quotient is from a tie.

    Returns:
      `(codes, scale, zero, margin, zero_margin)`; the margins are the distances of x / S, and of what the zero point is
      rounded from, to the next number half way between two codes.
    """
    low, high = code_range(bits, narrow_range)
    rows, columns = groups_of(w.shape, granularity, group_size)
    codes, margin = np.zeros(w.shape), np.zeros(w.shape)
    scale, zero, zero_margin = np.zeros((3, rows.max() + 1, columns.max() + 1))
    for g, c in np.ndindex(scale.shape):
        here = (rows == g) & (columns == c)
        x = w[here].astype(np.float64)
        if symmetric:
            scale[g, c] = np.abs(x).max() / ((high - low) / 2)
            offset = 0.0
        else:
            scale[g, c] = (max(x.max(), 0) - min(x.min(), 0)) / (high - low)
            offset = low - min(x.min(), 0) / scale[g, c]
        zero[g, c], zero_margin[g, c] = np.clip(np.round(offset), low, high), _from_tie(offset)
        steps = x / scale[g, c]
        codes[here], margin[here] = np.clip(np.round(steps) + zero[g, c], low, high), _from_tie(steps)
    return codes, scale, zero, margin, zero_margin


def _from_tie(x):
    return np.abs(x - np.floor(x) - 0.5)


def gptq(
    w,
    gram,
    bits,
    symmetric,
    granularity,
    group_size=None,
    narrow_range=False,
    act_order=True,
    percdamp=0.01,
    scale_dtype=np.float64,
):
    """Algorithm 1 of arXiv:2210.17323, row by row, on weights `[K, N]`: no blocks, and an explicit inverse.

    Channels without input keep their place with the mean diagonal of the others. With act_order the groups are static.
    """
    w, h = w.astype(np.float64), gram.astype(np.float64)
    static = rtn(w, bits, symmetric, granularity, group_size, narrow_range, scale_dtype)
    codes, scale, zero = (a.copy() for a in static)
    if not np.any(np.diag(h)):
        return codes, scale, zero
    mean = np.diag(h)[np.diag(h) > 0].mean()
    h = h + np.diag(np.where(np.diag(h) == 0, mean, 0)) + percdamp * mean * np.eye(len(h))
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
    rows, columns = groups_of(w.shape, granularity, group_size)
    w = w[order]
    for i, k in enumerate(order):
        if granularity == "per_group" and not act_order and k % group_size == 0:
            for c in range(w.shape[1]):
                ahead = w[i : i + group_size, c]
                scale[rows[k, c], c], zero[rows[k, c], c] = choose(ahead, bits, symmetric, narrow_range, scale_dtype)
        s, z = scale[rows[k], columns[k]], zero[rows[k], columns[k]]
        codes[k] = encode(w[i], s, z, bits, narrow_range)
        error = (w[i] - (codes[k] - z) * s) / upper[i, i]
        w[i:] -= np.outer(upper[i, i:], error)
    return codes, scale, zero


def pack(codes, bits):
    """The bitstream of unsigned codes in one dimension, by way of single bits."""
    shifts = np.arange(bits)
    stream = ((np.asarray(codes, np.uint8)[:, None] >> shifts) & 1).reshape(-1)
    stream = np.pad(stream, (0, -len(stream) % (8 * bits)))
    return np.packbits(stream, bitorder="little")
