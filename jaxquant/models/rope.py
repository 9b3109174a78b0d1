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

Length = int | jax.Array


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency is divided by `factor`."""

    factor: float

    def scale(self, frequencies: np.ndarray, length: Length) -> np.ndarray:
        """Returns the scaled frequencies, same shape; sequences of all lengths have the same."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequencies: np.ndarray, length: Length) -> np.ndarray:
        """Returns the scaled frequencies, same shape; sequences of all lengths have the same."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv:2402.13753): each frequency has a divisor, another one in sequences beyond the original length.

    A sequence that grows beyond it changes the rotation of all its positions, so keys that were rotated before are of
    no use then. `magnitude` multiplies the tables, and so the scores of attention twice.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    magnitude: float

    def scale(self, frequencies: np.ndarray, length: Length) -> jax.Array:
        """Returns the scaled frequencies `[*length.shape, 1, dim / 2]`, float32, for sequences of `length` tokens."""
        long, short = (
            jnp.asarray(frequencies / np.asarray(f), jnp.float32) for f in (self.long_factor, self.short_factor)
        )
        return jnp.where(jnp.asarray(length)[..., None, None] > self.original_max_position_embeddings, long, short)


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


def rope_tables(positions: jax.Array, length: Length, ropes: tuple[Rope, ...]) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines of some positions.

    Args:
      positions: int32 `[time]`, or of several sequences `[batch, time]`.
      length: of the sequences that they are in, an integer or int32 `[batch]`.
      ropes: how heads are rotated.

    Returns:
      Two float32 arrays `[len(ropes), *positions.shape, dim / 2]`.
    """
    if not ropes:
        return jnp.zeros((0, *positions.shape, 0)), jnp.zeros((0, *positions.shape, 0))
    at = positions.astype(jnp.float32)[..., None]
    angles = [at * jnp.asarray(_frequencies(rope, length), dtype=jnp.float32) for rope in ropes]
    magnitudes = [getattr(rope.scaling, "magnitude", 1.0) for rope in ropes]
    cos = jnp.stack([jnp.cos(angle) * magnitude for angle, magnitude in zip(angles, magnitudes, strict=True)])
    return cos, jnp.stack([jnp.sin(angle) * magnitude for angle, magnitude in zip(angles, magnitudes, strict=True)])


def _frequencies(rope: Rope, length: Length) -> np.ndarray | jax.Array:
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
