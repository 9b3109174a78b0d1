"""Decoders of other tools' weights, written from the descriptions of the formats, one number at a time: oracles."""

import numpy as np


def stream(words, bits, count):
    """`count` fields of `bits` bits of 32-bit words, from the lowest bit of the first up."""
    number = sum(int(np.uint32(np.int64(word) % 2**32)) << 32 * i for i, word in enumerate(words))
    return [number >> bits * i & 2**bits - 1 for i in range(count)]


def gptq(arrays, bits, version):
    """The weight `[out, in]`, float64, of qweight, qzeros, scales and g_idx; version 1 or 2."""
    qweight, qzeros, scales, g_idx = (np.asarray(arrays[p]) for p in ("qweight", "qzeros", "scales", "g_idx"))
    codes = np.array([stream(column, bits, len(g_idx)) for column in qweight.T])
    zeros = np.array([stream(row, bits, len(codes)) for row in qzeros])
    if version == 1:
        zeros = (zeros + 1) % 2**bits
    w = np.zeros(codes.shape)
    for n, k in np.ndindex(w.shape):
        w[n, k] = float(scales[g_idx[k], n]) * (int(codes[n, k]) - int(zeros[g_idx[k], n]))
    return w


def awq(arrays):
    """The weight `[out, in]`, float64, of qweight, qzeros and scales."""
    scales = np.asarray(arrays["scales"], np.float64)
    codes, zeros = (_awq_fields(np.asarray(arrays[part])) for part in ("qweight", "qzeros"))
    group = len(codes) // len(scales)
    w = np.zeros(codes.shape[::-1])
    for n, k in np.ndindex(w.shape):
        w[n, k] = scales[k // group, n] * (codes[k, n] - zeros[k // group, n])
    return w


def _awq_fields(words):
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of word c holds column 8c + order[i]
    columns = np.zeros((len(words), 8 * words.shape[1]), int)
    for r, c in np.ndindex(words.shape):
        for i, field in enumerate(stream([words[r, c]], 4, 8)):
            columns[r, 8 * c + order[i]] = field
    return columns


def bitsandbytes(arrays):
    """The weight `[out, in]`, float64, of weight and SCB."""
    return np.asarray(arrays["weight"], np.float64) * np.asarray(arrays["SCB"], np.float64)[:, None] / 127
