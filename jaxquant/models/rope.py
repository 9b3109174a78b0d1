"""Rotary position embedding (RoFormer, arXiv:2104.09864) with the two frequency scalings that Llama checkpoints use.

Everything here is float32, as in the reference implementation: a position of a few thousand times a frequency has no
room for a shorter mantissa. The halves of a head are rotated against each other (the layout of Hugging Face's
checkpoints), not neighbouring pairs (the paper's).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor`."""

    factor: float

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies, same shape."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies, same shape."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)


RopeScaling = LinearScaling | Llama3Scaling


def rope_tables(length: int, head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines of positions `0..length-1`, each float32 `[length, head_dim / 2]`."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        frequencies = scaling.scale(frequencies)
    positions = jnp.arange(length, dtype=jnp.float32)
    angles = positions[:, None] * jnp.asarray(frequencies, dtype=jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x` `[batch, time, heads, head_dim]` by its positions; keeps its dtype.

    `cos` and `sin` are the tables of `rope_tables`, `[time, head_dim / 2]`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
