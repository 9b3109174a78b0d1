"""SmoothQuant: moves the outliers of the inputs into the weights, so that both can be rounded.

Paper: Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438. Original code: github.com/mit-han-lab/smoothquant.

Channel j of the inputs is divided by s_j = max|X_j|^α / max|W_j|^(1-α), and row j of the weight multiplied with it. At
α = 1 the weights take all of the difficulty, at 0 they give their own away; 0.5 splits it evenly.

Differences from the original code:
- Nothing has to be folded into a norm before: products divide their input.
- α can be searched for each weight, by the output error of the rounded weight and inputs on held-out tokens.
- Scales are normalized by the geometric mean of the smallest and the largest, and a channel that is always zero keeps 1
  (there: 1e-5 in place of its maximum).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics import affine
from jaxquant.numerics.activations import with_static_qparams
from jaxquant.numerics.channel_scale import Facts, normalized, quantize_with_scale, scale_and_quantize
from jaxquant.numerics.output_error import output_error
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import ActivationSpec, QuantSpec, check_weight_spec
from jaxquant.numerics.statistics import InputStatistics

W8A8 = QuantSpec(bits=8, activations=ActivationSpec())
GRID = 11  # values of α that are tried, from 0 to 1


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """Smooths inputs, then rounds weights to the nearest code.

    Attributes:
      alpha: α, from 0 to 1; None searches it.
      spec: of the result; by default W8A8, per channel and with dynamic per-token activations. As a step of a `Chain`
        only its `activations` are read, and those only where α is searched.

    Raises:
      ValueError: alpha is outside [0, 1], or the spec is none for weights.
    """

    alpha: float | None = 0.5
    spec: QuantSpec = W8A8
    needs_statistics: ClassVar[bool] = True
    any_bits: ClassVar[bool] = True

    def __post_init__(self):
        check_weight_spec(self.spec)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r} must be from 0 to 1, or None to search it; try 0.5")

    def channel_scale(self, w: jax.Array, stats: InputStatistics) -> tuple[jax.Array, Facts]:
        """s of the paper, `[K]`, for a weight `[K, N]`; see `numerics.channel_scale.ScalesChannels`."""
        if self.alpha is not None:
            alpha = jnp.asarray(self.alpha, stats.gram.dtype)
            return _scale(w, stats, alpha), {"alpha": alpha}
        grid = jnp.linspace(0, 1, GRID, dtype=stats.gram.dtype)
        errors = lax.map(lambda alpha: _error(w, stats, _scale(w, stats, alpha), self), grid)
        best = grid[jnp.argmin(jnp.where(jnp.isfinite(errors), errors, jnp.inf))]
        return _scale(w, stats, best), {"alpha": best}

    def quantize_scaled(self, w: jax.Array, stats: InputStatistics) -> tuple[QTensor, Facts]:
        """Rounds to nearest."""
        del stats
        return affine.quantize(w, self.spec, contract=(-2,), out=(-1,)), {}

    def quantize(self, w: jax.Array, stats: InputStatistics | None) -> tuple[QTensor, Facts]:
        """Quantizes `w` `[in, out]`; returns the QTensor and `alpha`. Raises ValueError without statistics."""
        return scale_and_quantize(self, w, stats, "SmoothQuant")


def _scale(w: jax.Array, stats: InputStatistics, alpha: jax.Array) -> jax.Array:
    inputs, weights = stats.absmax, jnp.max(jnp.abs(w.astype(stats.absmax.dtype)), 1)
    live = (inputs > 0) & (weights > 0)
    scale = jnp.where(live, inputs, 1) ** alpha / jnp.where(live, weights, 1) ** (1 - alpha)
    return normalized(jnp.where(live, scale, 0))


def _error(w: jax.Array, stats: InputStatistics, scale: jax.Array, config: SmoothQuant) -> jax.Array:
    q, _ = quantize_with_scale(config, w, stats, scale)
    return output_error(w, with_static_qparams(q, stats), stats.held_out)
