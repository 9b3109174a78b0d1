"""From codes that another method has chosen to weights whose training begins with them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.affine import per_code
from jaxquant.numerics.layout import from_canonical, to_canonical
from jaxquant.numerics.qtensor import QTensor, is_qtensor, more_than_codes
from jaxquant.numerics.spec import compute_dtype
from jaxquant.transforms.tracing.interpreter import named_leaves
from jaxquant.transforms.training.state import at, nested
from jaxquant.transforms.training.steps import TrainState
from jaxquant.transforms.training.taken import Taken

WITHIN = 0.4  # of a step, around its code; at half a step, where compensated weights would lie, the next noise flips it


def start_from(state: TrainState, qparams: Any) -> TrainState:
    """Lets a training begin with the codes and scales that another method has chosen, for example GPTQ.

    Each weight goes from where it is to the nearest place that is safely rounded to its code; learned ranges are the
    scales and zero points of the codes. Other parameters, and ranges of inputs, stay as they are.

    Args:
      state: from `train_state`, for a recipe of `jq.LSQ(spec)`; it is used up by the next step, as the result is.
      qparams: from `quantize_params`, for the same parameters and specs.

    Returns:
      The state to begin with, of the same shapes and dtypes.

    Raises:
      ValueError: a step has been taken, or a weight that is trained has no learned ranges, or is none in `qparams`
        that those can stand for.
    """
    if int(state.qat.step):
        raise ValueError(f"state.qat.step={int(state.qat.step)}: the training has begun; give a state of train_state")
    given = dict(named_leaves(qparams, is_qtensor))
    named = dict(named_leaves(state.params, is_qtensor))
    ranges = {}
    for t in state.qat.weights:
        q = _checked(t, given.get(t.path))
        named[t.path] = _nearest(named[t.path], q)
        own = {"scale": q.scale} if q.zero_point is None else {"scale": q.scale, "zero_point": q.zero_point}
        old = at(state.qat.ranges, t.path)
        copied = {name: jnp.array(a, old[name].dtype) for name, a in own.items()}  # a step uses its state up
        ranges[t.path] = old | copied
    structure = jax.tree.structure(state.params, is_leaf=is_qtensor)
    params = jax.tree.unflatten(structure, list(named.values()))
    return dataclasses.replace(state, params=params, qat=dataclasses.replace(state.qat, ranges=nested(ranges)))


def _checked(t: Taken, q: Any) -> QTensor:
    if not t.learned:
        raise ValueError(f"'{t.path}' is trained with the extremes as its range, not with given scales; use jq.LSQ")
    if not is_qtensor(q):
        raise ValueError(f"qparams: '{t.path}' is trained with rounded numbers, and is not quantized there")
    if q.spec != t.spec or q.shape != t.shape or (q.contract, q.out) != (t.contract, t.out):
        raise ValueError(f"qparams: '{t.path}' is {q.spec} {list(q.shape)}, and is trained as {t.spec} {list(t.shape)}")
    if found := more_than_codes(q):
        raise ValueError(
            f"qparams: '{t.path}' has {', '.join(found)}, which ranges cannot stand for; use jq.GPTQ(spec)"
        )
    return q


@jax.jit
def _nearest(w: jax.Array, q: QTensor) -> jax.Array:
    """What rounds to the codes and lies nearest to the weight."""
    wide = compute_dtype(w.dtype)
    canonical, codes = to_canonical(w, q.contract, q.out).astype(wide), q.codes.astype(wide)
    zero = jnp.zeros_like(q.scale) if q.zero_point is None else q.zero_point
    scale, zero = per_code(q.scale.astype(wide), zero.astype(wide), codes.shape, len(q.out))
    center = (codes - zero) * scale
    near = jnp.clip(canonical, center - WITHIN * scale, center + WITHIN * scale)
    return from_canonical(near, q.contract, q.out, q.in_shape).astype(w.dtype)
