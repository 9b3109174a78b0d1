"""Weights and input statistics that the tests of methods share."""

import jax.numpy as jnp
import numpy as np

from jaxquant.numerics.affine import dequantize
from jaxquant.numerics.statistics import InputStatistics


def weights(*shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def correlated(k, tokens, dtype=np.float32, seed=0):
    """Inputs `[tokens, k]` whose channels are strongly correlated and of very different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(k, k)) / np.sqrt(k) + 0.5 * np.eye(k)
    return (rng.normal(size=(tokens, k)) @ mix * np.exp(rng.normal(size=k))).astype(dtype)


def statistics_of(x):
    """Statistics of inputs `[*lead, T, K]`, all of them calibration tokens and held out too."""
    tokens = x.shape[-2]
    gram = np.swapaxes(x, -1, -2) @ x / max(tokens, 1)
    count = np.full(x.shape[:-2], tokens, x.dtype)
    size, lowest, highest = np.abs(x), x.min(-2, initial=0), x.max(-2, initial=0)
    fields = gram, lowest, highest, size.sum(-2) / max(tokens, 1), count, 0 * count, x
    return InputStatistics(*map(jnp.asarray, fields))


def output_error(w, q, gram):
    """tr(Δᵀ H Δ) of a quantized `[K, N]` weight, in float64."""
    delta = np.asarray(dequantize(q, jnp.float32), np.float64) - np.asarray(w, np.float64)
    return float(np.sum(delta * (np.asarray(gram, np.float64) @ delta)))
