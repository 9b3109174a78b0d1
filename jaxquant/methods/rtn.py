"""RTN: every weight is rounded to the nearest code, with scales from the extremes of each range or narrower ones.

The baseline of every other method, and what they fall back to where there is no calibration data.
"""

import dataclasses
from typing import ClassVar

import jax

from jaxquant.numerics import affine
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.scale_search import Clip, check_clip, clipped
from jaxquant.numerics.spec import QuantSpec, check_weight_spec
from jaxquant.numerics.statistics import InputStatistics


@dataclasses.dataclass(frozen=True)
class RTN:
    """Rounds to the nearest code.

    Attributes:
      spec: bits, symmetry and granularity of the result.
      clip: choose scales that clip, by the error that this names (see `numerics.scale_search`); None takes the
        extremes.

    Raises:
      ValueError: the spec is none for weights, or `clip` is none of the errors.
    """

    spec: QuantSpec
    clip: Clip | None = None
    any_bits: ClassVar[bool] = True

    def __post_init__(self):
        check_weight_spec(self.spec)
        check_clip(self.clip)

    @property
    def needs_statistics(self) -> bool:
        """Whether the error is one of the output."""
        return self.clip in ("diagonal", "output")

    def quantize(self, w: jax.Array, stats: InputStatistics | None = None) -> tuple[QTensor, dict[str, jax.Array]]:
        """`rtn(w, stats, self)`."""
        return rtn(w, stats, self)


def rtn(w: jax.Array, stats: InputStatistics | None, config: RTN) -> tuple[QTensor, dict[str, jax.Array]]:
    """Quantizes `w`.

    Args:
      w: float `[in, out]`.
      stats: of its inputs; read where `config.needs_statistics`.
      config: static.

    Returns:
      The QTensor, and no facts.

    Raises:
      ValueError: the group size does not divide the inputs, or there are no statistics where they are needed.
      TypeError: w is not floating.
    """
    if config.clip is None:
        return affine.quantize(w, config.spec, contract=(-2,), out=(-1,)), {}
    if config.needs_statistics and stats is None:
        raise ValueError(f"RTN(clip={config.clip!r}) needs calibration statistics, and stats is None")
    return clipped(w, config.spec, config.clip, None if stats is None else stats.gram), {}
