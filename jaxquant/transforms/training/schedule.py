"""When rounding begins, how fast, and with how many bits; and how ranges of inputs follow what is seen."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.numerics.bits import traced_bits
from jaxquant.numerics.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What becomes of rounding in the course of a training.

    Attributes:
      start: steps without any.
      anneal: steps after that in which numbers go from x to what their codes stand for, evenly. 0 goes at once.
      bits: `((step, bits), ...)`, ascending: before each step weights have at least so many bits, after the last those
        of their spec.

    Raises:
      ValueError: a number is out of its range, or the steps do not ascend.
    """

    start: int = 0
    anneal: int = 0
    bits: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for name in ("start", "anneal"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}={value!r} must be a whole number of steps, 0 or more")
        object.__setattr__(self, "bits", tuple(map(tuple, self.bits)))
        steps = [pair[0] for pair in self.bits]
        whole = all(len(pair) == 2 and all(type(n) is int for n in pair) for pair in self.bits)
        if not whole or steps != sorted(set(steps)) or not all(2 <= pair[1] <= 8 for pair in self.bits):
            raise ValueError(f"bits={self.bits!r} must be pairs (step, bits) with ascending steps and 2 to 8 bits")

    @property
    def settled(self) -> int:
        """The first step from which on nothing changes."""
        return max([self.start + self.anneal, *(step for step, _ in self.bits)])

    def strength(self, step: jax.Array) -> jax.Array | None:
        """The share, 0 to 1, of rounding in a step, float32 `[]`; None if it always is 1."""
        if not self.start and not self.anneal:
            return None
        done = (step - self.start).astype(jnp.float32)
        return jnp.clip(done / self.anneal, 0, 1) if self.anneal else (done >= 0).astype(jnp.float32)

    def spec(self, spec: QuantSpec, step: jax.Array) -> QuantSpec:
        """The spec of weights in a step, whose bits may be traced."""
        if not self.bits:
            return spec
        bits = jnp.asarray(spec.bits, jnp.int32)
        for until, least in reversed(self.bits):
            bits = jnp.where(step < until, max(least, spec.bits), bits)
        return traced_bits(spec, bits)


@dataclasses.dataclass(frozen=True)
class MovingAverage:
    """How the static range of inputs follows the extremes of each batch (Jacob et al. 2018, arXiv:1712.05877, §3.1).

    Attributes:
      decay: of the old range, per step.
      start: steps in which inputs are not rounded, only watched.

    Raises:
      ValueError: a number is out of its range.
    """

    decay: float = 0.99
    start: int = 0

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay!r} must be 0 or more, and less than 1")
        if type(self.start) is not int or self.start < 0:
            raise ValueError(f"start={self.start!r} must be a whole number of steps, 0 or more")


def mixed(x: jax.Array, rounded: jax.Array, strength: jax.Array | None) -> jax.Array:
    """x, `rounded`, or what is between them; exactly `rounded` at a strength of 1."""
    if strength is None:
        return rounded
    between = x + strength.astype(x.dtype) * (rounded - x)
    return jnp.where(strength >= 1, rounded, between)
