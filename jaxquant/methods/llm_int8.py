"""LLM.int8(): 8-bit products, except for the few input channels that hold outliers.

Paper: Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv:2208.07339.
Original code: github.com/bitsandbytes-foundation/bitsandbytes.

A channel of which any token's input is as large as the threshold α is an outlier. With O the set of them,

    y = Σ_{k in O} x_k w_k + s t Σ_{k not in O} a_k c_k,

the first sum in floating point, the second of 8-bit codes with a scale s per token and t per output. O is found when
the product runs.

Differences from the original code:
- Float weights are kept for the channels that calibration has seen as outliers, the largest of them where they are
  more than one in eight. (There, for all channels, or dequantized from the codes.) Other channels that turn out to be
  outliers use dequantized weights.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics import affine
from jaxquant.numerics.channel_scale import Facts
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import ActivationSpec, QuantSpec, check_weight_spec
from jaxquant.numerics.statistics import InputStatistics

MULTIPLE = 8  # outlier channels are kept in multiples of this, so that fewer programs are compiled
MOST = 8  # at most one channel in this many is kept


@dataclasses.dataclass(frozen=True)
class LLMInt8:
    """Rounds weights and inputs to 8 bits, and keeps channels with outliers in floating point.

    Attributes:
      threshold: α, the size from which on an input is an outlier.
      spec: of the codes of the weights; its activations are set to dynamic per-token ones with the threshold.
      outliers: channels of which float weights are kept, those of largest input; 0 dequantizes all, as the original
        code does and its files expect; None takes as many as calibration has found, up to one in eight
        (`quantize_params` counts them).

    Raises:
      ValueError: the threshold is not positive, the number of outliers is none, or the spec is none for weights.
    """

    threshold: float = 6.0
    spec: QuantSpec = QuantSpec()  # noqa: RUF009
    outliers: int | None = None
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self):
        check_weight_spec(self.spec)
        if self.outliers is not None and (type(self.outliers) is not int or self.outliers < 0):
            raise ValueError(f"outliers={self.outliers!r} must be a whole number, or None to count them")
        activations = ActivationSpec(outlier_threshold=self.threshold)
        object.__setattr__(self, "spec", dataclasses.replace(self.spec, activations=activations))

    def for_inputs(self, stats: InputStatistics) -> "LLMInt8":
        """The config with the number of outliers of some inputs `[*lead, ...]`, the largest of a stack."""
        if self.outliers is not None:
            return self
        found = int(jnp.max(jnp.sum(stats.absmax >= self.threshold, -1), initial=1))
        kept = min(found, max(1, stats.absmax.shape[-1] // MOST))
        return dataclasses.replace(self, outliers=min(-(-kept // MULTIPLE) * MULTIPLE, stats.absmax.shape[-1]))

    def quantize(self, w: jax.Array, stats: InputStatistics | None) -> tuple[QTensor, Facts]:
        """Quantizes `w` `[in, out]`; returns the QTensor and `outliers`, the number that calibration has seen.

        Raises:
          ValueError: no statistics, or a number of outliers that is not known.
        """
        if stats is None:
            raise ValueError("LLMInt8 needs calibration statistics, and stats is None; RTN needs none")
        if self.outliers is None:
            raise ValueError("outliers=None is filled in by quantize_params; give their number, or use `for_inputs`")
        _, index = lax.top_k(stats.absmax, min(self.outliers, len(w)))
        q = affine.quantize(w, self.spec)
        found = jnp.sum(stats.absmax >= self.threshold, dtype=jnp.int32)
        return dataclasses.replace(q, outlier_index=index[:, None], outlier_weight=w[index]), {"outliers": found}
