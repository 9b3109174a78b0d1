"""RTN: every weight is rounded to the nearest code, with scales from the extremes of each range.

The baseline of every other method, and what they fall back to where there is no calibration data.
"""

import dataclasses
from typing import ClassVar

import jax

from jaxquant.numerics import affine
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec, check_weight_spec
from jaxquant.numerics.statistics import InputStatistics


@dataclasses.dataclass(frozen=True)
class RTN:
    """Rounds to the nearest code.

    Attributes:
      spec: bits, symmetry and granularity of the result.

    Raises:
      ValueError: the spec is none for weights.
    """

    spec: QuantSpec
    needs_statistics: ClassVar[bool] = False

    def __post_init__(self):
        check_weight_spec(self.spec)

    def quantize(self, w: jax.Array, stats: InputStatistics | None = None) -> tuple[QTensor, dict[str, jax.Array]]:
        """`rtn(w, stats, self)`."""
        return rtn(w, stats, self)


def rtn(w: jax.Array, stats: InputStatistics | None, config: RTN) -> tuple[QTensor, dict[str, jax.Array]]:
    """Quantizes `w`.

    Args:
      w: float `[in, out]`.
      stats: not read.
      config: static.

    Returns:
      The QTensor, and no facts.

    Raises:
      ValueError: the group size does not divide the inputs.
      TypeError: w is not floating.
    """
    del stats
    return affine.quantize(w, config.spec, contract=(-2,), out=(-1,)), {}
