"""AWQ: scales up the input channels that matter most before rounding, then clips.

Paper: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
arXiv:2306.00978. Original code: github.com/mit-han-lab/llm-awq.

Channel j of the inputs is divided by s_j and row j of the weight multiplied with it, where s = x^r or, as the original
code came to do it, s = x^r / w^(1-r): x is the mean |X_j|, w the mean |W_jn| relative to the largest of its group, and
r is tried from 0 to 1. Then the range of each group is shrunk as far as that lowers the error.

Differences from the original code:
- The error of a candidate is that of the output, tr((Ŵ - W)ᵀ H (Ŵ - W)) with H the mean of xᵀx, over all calibration
  tokens; there, a module's output is recomputed for some of them.
- Both forms of s are tried, and so is none (s = 1).
- Every weight is scaled, whether or not a norm or linear layer comes before it: products divide their input. Weights
  that share their inputs share s.
- After clipping by the error of the output, the scales of a column are fitted to that error jointly, codes staying as
  they are: clipping judged each group on its own, and what one leaves over another can take up.
- A channel that is always zero keeps s = 1.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics import affine
from jaxquant.numerics.affine import scaled_dense
from jaxquant.numerics.channel_scale import Facts, normalized, scale_and_quantize
from jaxquant.numerics.output_error import product
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.refine import refit_scales
from jaxquant.numerics.scale_search import Clip, check_clip, clipped
from jaxquant.numerics.spec import QuantSpec, check_weight_spec
from jaxquant.numerics.statistics import InputStatistics


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Scales channels by a searched power of their size, clips, and rounds to the nearest code.

    Attributes:
      spec: bits, symmetry and granularity of the result.
      clip: the error by which ranges are clipped after the scale is chosen (see `numerics.scale_search`); None does not
        clip. After "output" the scales of each column are fitted jointly. Not read where AWQ is a step of a `Chain`.
      grid: values of r that are tried.

    Raises:
      ValueError: a field is outside its range, or the spec is none for weights.
    """

    spec: QuantSpec
    clip: Clip | None = "output"
    grid: int = 20
    needs_statistics: ClassVar[bool] = True
    any_bits: ClassVar[bool] = True

    def __post_init__(self):
        check_weight_spec(self.spec)
        check_clip(self.clip)
        if type(self.grid) is not int or self.grid < 1:
            raise ValueError(f"grid={self.grid!r} must be a positive whole number; try 20")

    def channel_scale(self, w: jax.Array, stats: InputStatistics) -> tuple[jax.Array, Facts]:
        """The best s `[K]` for a weight `[K, N]`, and its `ratio` r; see `numerics.channel_scale.ScalesChannels`."""
        wide = w.astype(stats.gram.dtype)
        size = _relative_size(wide, self.spec)
        ratios = jnp.arange(self.grid, dtype=wide.dtype) / self.grid

        def scale_of(i):  # first all of one form, then all of the other
            r = ratios[i % self.grid]
            other = jnp.where(i >= self.grid, (size + 1e-4) ** (1 - r), 1)
            return normalized(jnp.where(stats.mean_abs > 0, stats.mean_abs**r / other, 0))

        def consider(i, best):
            error = _error(wide, stats.gram, scale_of(i), self.spec)
            return jax.tree.map(lambda new, old: jnp.where(error < best[0], new, old), (error, i), best)

        first = _error(wide, stats.gram, scale_of(0), self.spec), jnp.int32(0)  # r = 0 scales nothing
        _, chosen = lax.fori_loop(1, 2 * self.grid, consider, first)
        return scale_of(chosen), {"ratio": ratios[chosen % self.grid]}

    def quantize_scaled(self, w: jax.Array, stats: InputStatistics) -> tuple[QTensor, Facts]:
        """Clips, rounds to nearest, and after clip="output" fits the scales of each column to the codes."""
        q = clipped(w, self.spec, self.clip, stats.gram)
        if self.clip != "output" or self.spec.granularity == "per_tensor":
            return q, {}
        fitted = refit_scales(w.astype(stats.gram.dtype), stats.gram, q.codes, (q.scale, q.zero_point))
        return dataclasses.replace(q, scale=fitted), {}

    def quantize(self, w: jax.Array, stats: InputStatistics | None) -> tuple[QTensor, Facts]:
        """Quantizes `w` `[in, out]`; returns the QTensor and `ratio`. Raises ValueError without statistics."""
        return scale_and_quantize(self, w, stats, "AWQ")


def _relative_size(w: jax.Array, spec: QuantSpec) -> jax.Array:
    """The mean of |w| `[K]` over the columns, each weight relative to the largest of its group."""
    size = jnp.abs(w).reshape(spec.num_groups(len(w)), -1, w.shape[1])
    largest = jnp.max(size, 1, keepdims=True)
    return jnp.mean(size / jnp.where(largest > 0, largest, 1), 2).reshape(-1)


def _error(w: jax.Array, gram: jax.Array, scale: jax.Array, spec: QuantSpec) -> jax.Array:
    """tr(Δᵀ H Δ) of rounding to nearest with channels scaled."""
    q = affine.quantize(w * scale[:, None], spec)
    delta = scaled_dense(q).astype(w.dtype) / scale[:, None] - w
    return jnp.sum(delta * product(gram, delta))
