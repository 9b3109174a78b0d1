"""One matrix: the method's answer, or rounding to nearest where that does better on held-out calibration tokens."""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.kernels.matmul import quantized_matmul
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.activations import with_static_qparams
from jaxquant.numerics.channel_scale import quantize_with_scale
from jaxquant.numerics.output_error import energy, output_error, product
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec
from jaxquant.numerics.statistics import InputStatistics


class Fallback(enum.IntEnum):
    """Why a matrix was rounded to nearest in place of the method's answer."""

    NONE = 0
    NO_TOKENS = 1
    NOT_JUDGED = 2
    WORSE = 3
    NOT_FINITE = 4


FALLBACKS: dict[int, str | None] = {
    Fallback.NONE: None,
    Fallback.NO_TOKENS: "no calibration tokens",
    Fallback.NOT_JUDGED: "no held-out tokens to judge by",
    Fallback.WORSE: "worse than RTN on held-out tokens",
    Fallback.NOT_FINITE: "statistics are not finite",
}


def solve_one(
    config: Any, w: jax.Array, inputs: InputStatistics | None, channel_scale: jax.Array | None = None
) -> tuple[QTensor, dict[str, jax.Array]]:
    """Quantizes one matrix.

    Args:
      config: a method config.
      w: float `[in, out]`.
      inputs: statistics of its inputs; None where there are none, and then nothing is judged.
      channel_scale: `[in]`, what the method's `channel_scale` has given for this weight and those that share its
        inputs; None for methods without.

    Returns:
      The QTensor that is kept, and facts: `tokens`, `dropped`, `error` and `rtn_error` (as in `LayerReport`),
      `fallback` (a `Fallback`), and under `info/` what the method itself says.
    """
    if inputs is None or channel_scale is None:
        q, info = config.quantize(w, inputs)
    else:
        q, info = quantize_with_scale(config, w, inputs, channel_scale)
    if inputs is None:
        return q, {f"info/{k}": v for k, v in info.items()}
    nearest, _ = RTN(_without_outliers(config.spec)).quantize(w, None)
    if q.channel_scale is not None:
        nearest = dataclasses.replace(nearest, channel_scale=jnp.ones_like(q.channel_scale))
    q, nearest = (with_static_qparams(a, inputs) for a in (q, nearest))
    x = inputs.held_out
    scale = energy(product(x, w))
    errors = [weight_error(w, a, x) for a in (q, nearest)]
    judged = jnp.any(x != 0)
    errors = [jnp.where(e > 0, e / scale, e) for e in errors]  # a weight of zeros has none
    error, rtn_error = (jnp.where(judged, e, jnp.nan) for e in errors)
    fallback = jnp.where(error <= rtn_error, Fallback.NONE, Fallback.WORSE)
    fallback = jnp.where(jnp.isfinite(error) & jnp.isfinite(rtn_error), fallback, Fallback.NOT_FINITE)
    fallback = jnp.where(judged, fallback, Fallback.NOT_JUDGED)
    fallback = jnp.where(inputs.count > 0, fallback, Fallback.NO_TOKENS)
    if q.outlier_weight is not None or (isinstance(config, RTN) and config.clip is None):  # there is no other answer
        fallback = jnp.zeros_like(fallback)
    else:
        q = jax.tree.map(lambda a, b: jnp.where(fallback > 0, b, a), q, nearest)
    facts = {"tokens": inputs.count, "dropped": inputs.dropped, "rtn_error": rtn_error, "fallback": fallback}
    facts["error"] = jnp.where(fallback > 0, rtn_error, error)
    return q, facts | {f"info/{k}": v for k, v in info.items()}


def weight_error(w: jax.Array, q: QTensor, x: jax.Array) -> jax.Array:
    """‖x̂Ŵ - xW‖² as `output_error` has it, also of a weight that keeps outliers; arguments as there."""
    if q.outlier_weight is None:
        return output_error(w, q, x)
    rows = q.outlier_weight.astype(x.dtype)
    return energy(quantized_matmul(x, dataclasses.replace(q, dtype=x.dtype.name, outlier_weight=rows)) - product(x, w))


def _without_outliers(spec: QuantSpec) -> QuantSpec:
    """The spec without a threshold: everything is rounded."""
    if spec.activations is None:
        return spec
    return dataclasses.replace(spec, activations=dataclasses.replace(spec.activations, outlier_threshold=None))
