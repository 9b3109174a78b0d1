"""One matrix: the method's answer, or rounding to nearest where that does better on held-out calibration tokens."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels.reference import dense, round_input
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.affine import choose_qparams
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import ActivationSpec
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


def solve_one(config, w: jax.Array, inputs: InputStatistics | None) -> tuple[QTensor, dict[str, jax.Array]]:
    """Quantizes one matrix.

    Args:
      config: a method config.
      w: float `[in, out]`.
      inputs: statistics of its inputs; None where there are none, and then nothing is judged.

    Returns:
      The QTensor that is kept, and facts: `tokens`, `dropped`, `error` and `rtn_error` (as in `LayerReport`),
      `fallback` (a `Fallback`), and under `info/` what the method itself says.
    """
    q, info = config.quantize(w, inputs)
    if inputs is None:
        return q, {f"info/{k}": v for k, v in info.items()}
    nearest, _ = RTN(config.spec).quantize(w, None)
    x, activations = inputs.held_out, config.spec.activations
    input_scale = _input_scale(inputs.absmax, activations, q.scale.dtype) if config.spec.static_activations else None
    shift = round_input(x, input_scale, activations) - x
    scale = _energy(_product(x, w))
    errors = [
        _energy(_product(x, _dense(a, x) - w.astype(x.dtype)) + _product(shift, _dense(a, x))) for a in (q, nearest)
    ]
    error, rtn_error = (jnp.where(e > 0, e / scale, e) for e in errors)  # a weight of zeros has none
    fallback = jnp.where(error <= rtn_error, Fallback.NONE, Fallback.WORSE)
    fallback = jnp.where(jnp.isfinite(error) & jnp.isfinite(rtn_error), fallback, Fallback.NOT_FINITE)
    fallback = jnp.where(jnp.any(x != 0), fallback, Fallback.NOT_JUDGED)
    fallback = jnp.where(inputs.count > 0, fallback, Fallback.NO_TOKENS)
    if isinstance(config, RTN):
        fallback = jnp.zeros_like(fallback)
    q = jax.tree.map(lambda a, b: jnp.where(fallback > 0, b, a), q, nearest)
    q = dataclasses.replace(q, input_scale=input_scale)
    facts = {"tokens": inputs.count, "dropped": inputs.dropped, "rtn_error": rtn_error, "fallback": fallback}
    facts["error"] = jnp.where(fallback > 0, rtn_error, error)
    return q, facts | {f"info/{k}": v for k, v in info.items()}


def _input_scale(absmax: jax.Array, activations: ActivationSpec, dtype) -> jax.Array:
    """The static scale `[1, 1]` of inputs whose channels reach as far as `absmax` `[K]`."""
    spec = dataclasses.replace(activations.spec, scale_dtype=dtype.name)
    return choose_qparams(absmax[:, None], spec)[0]


def _dense(q: QTensor, x: jax.Array) -> jax.Array:
    return dense(q).astype(x.dtype)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w.astype(x.dtype), precision=lax.Precision.HIGHEST)


def _energy(y: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(y))
