"""Rotary position embedding (RoFormer, arXiv:2104.09864) with the frequency scalings that checkpoints use.

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

    def scale(self, frequencies: np.ndarray, length: int) -> np.ndarray:
        """Returns the scaled frequencies, same shape, for sequences of `length` tokens."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequencies: np.ndarray, length: int) -> np.ndarray:
        """Returns the scaled frequencies, same shape, for sequences of `length` tokens."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv:2402.13753): each frequency has a divisor, another one in sequences beyond the original length.

    `magnitude` multiplies the tables, and so the scores of attention twice.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    magnitude: float

    def scale(self, frequencies: np.ndarray, length: int) -> np.ndarray:
        """Returns the scaled frequencies, same shape, for sequences of `length` tokens."""
        is_long = length > self.original_max_position_embeddings
        return frequencies / np.asarray(self.long_factor if is_long else self.short_factor)


RopeScaling = LinearScaling | Llama3Scaling | LongRope


@dataclasses.dataclass(frozen=True)
class Rope:
    """How heads are rotated: their first `dim` features, by frequencies from 1 down to almost 1 / `theta`, scaled.

    Raises ValueError for a `dim` that is odd or 0: halves are rotated against each other.
    """

    dim: int
    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self):
        if self.dim % 2 or not self.dim:
            what = "odd" if self.dim else "nothing"
            raise ValueError(f"head_dim={self.dim} is {what}, but rotary embedding needs two equal halves")


def rope_tables(length: int, ropes: tuple[Rope, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines of positions `0..length-1`, each float32 `[len(ropes), length, dim / 2]`."""
    if not ropes:
        return jnp.zeros((0, length, 0)), jnp.zeros((0, length, 0))
    positions = jnp.arange(length, dtype=jnp.float32)
    angles = [positions[:, None] * jnp.asarray(_frequencies(rope, length), dtype=jnp.float32) for rope in ropes]
    magnitudes = [getattr(rope.scaling, "magnitude", 1.0) for rope in ropes]
    cos = jnp.stack([jnp.cos(angle) * magnitude for angle, magnitude in zip(angles, magnitudes, strict=True)])
    return cos, jnp.stack([jnp.sin(angle) * magnitude for angle, magnitude in zip(angles, magnitudes, strict=True)])


def _frequencies(rope: Rope, length: int) -> np.ndarray:
    frequencies = rope.theta ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    return frequencies if rope.scaling is None else rope.scaling.scale(frequencies, length)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first features of `x` `[batch, time, heads, head_dim]` by its positions; keeps its dtype.

    `cos` and `sin` are the tables of one rope, `[time, dim / 2]`, or of each sequence, `[batch, time, dim / 2]`.
    """
    rotated, kept = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, kept], axis=-1) if kept.shape[-1] else rotated
