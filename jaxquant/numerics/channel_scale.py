"""Scales of input channels: W′ = D W is rounded in place of W, and products divide their input by D.

With H the mean of xᵀx, the inputs x D⁻¹ of W′ have D⁻¹ H D⁻¹, so every method runs unchanged on W′ and on statistics
divided by D. Methods that choose a D (SmoothQuant, AWQ, and a Chain that begins with one) are `ScalesChannels`.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec, compute_dtype
from jaxquant.numerics.statistics import InputStatistics, divided

Facts = dict[str, jax.Array]


class ScalesChannels(Protocol):
    """A method that scales input channels before it rounds; weights that share their inputs share the scale."""

    spec: QuantSpec

    def channel_scale(self, w: jax.Array, stats: InputStatistics) -> tuple[jax.Array, Facts]:
        """The scales of the input channels.

        Args:
          w: float `[K, N]`, the columns of all weights that share the inputs.
          stats: of the inputs.

        Returns:
          Positive scales `[K]` in the dtype of `stats`, and facts for the report.
        """

    def quantize_scaled(self, w: jax.Array, stats: InputStatistics) -> tuple[QTensor, Facts]:
        """Quantizes a weight `[K, N]` whose channels are scaled already, with the statistics of divided inputs."""


def scale_and_quantize(config: Any, w: jax.Array, stats: InputStatistics | None, name: str) -> tuple[QTensor, Facts]:
    """The `quantize` of a method that scales channels; `name` is that of the method in the error without statistics."""
    if stats is None:
        raise ValueError(f"{name} needs calibration statistics, and stats is None; RTN needs none")
    scale, info = config.channel_scale(w, stats)
    q, more = quantize_with_scale(config, w, stats, scale)
    return q, info | more


def quantize_with_scale(
    config: Any, w: jax.Array, stats: InputStatistics, channel_scale: jax.Array
) -> tuple[QTensor, Facts]:
    """Scales a weight `[K, N]`, quantizes it by `config.quantize_scaled`, and keeps the scales `[K]` in the QTensor.

    The scales are rounded to the dtype of the codes' scales first. Returns the QTensor and the method's facts.
    """
    kept = channel_scale.astype(config.spec.scale_dtype or w.dtype)
    wide = compute_dtype(w.dtype)
    scaled = (w.astype(wide) * kept[:, None].astype(wide)).astype(w.dtype)
    q, info = config.quantize_scaled(scaled, divided(stats, kept))
    return dataclasses.replace(q, channel_scale=kept[:, None]), info


def normalized(scale: jax.Array) -> jax.Array:
    """Scales `[K]` made finite and positive, divided by the geometric mean of the smallest and the largest.

    The division keeps W′ and its inputs in the range of W and x; a channel without a scale gets 1.
    """
    tiny = float(jnp.finfo(scale.dtype).tiny)
    ok = jnp.isfinite(scale) & (scale > tiny)
    low, high = jnp.min(jnp.where(ok, scale, jnp.inf)), jnp.max(jnp.where(ok, scale, 0))
    middle = jnp.sqrt(low) * jnp.sqrt(high)
    return jnp.where(ok, scale / jnp.where(jnp.any(ok), middle, 1), 1)
