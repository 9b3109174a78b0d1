"""From trained weights to the codes that they were trained as."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.transforms.jobs import count_not_finite
from jaxquant.transforms.recipe import resolve
from jaxquant.transforms.tracing.interpreter import named_leaves
from jaxquant.transforms.training import ranges
from jaxquant.transforms.training.state import QATState, at
from jaxquant.transforms.training.taken import Taken


def convert(params: Any, state: QATState, recipe: Any) -> Any:
    """Quantizes trained parameters to what the function was trained with.

    `quantized(fn)` of the result is `fake_quantized(fn, recipe).apply` of the parameters and the state, up to rounding
    of floats.

    Args:
      params: the parameters.
      state: that of the last step.
      recipe: the one that they were trained with.

    Returns:
      The tree, with QTensors in place of the weights that were rounded.

    Raises:
      ValueError: no step has been taken, the schedule is not at its end, the recipe is another one, or a weight or a
        range is not finite.
    """
    step = int(state.step)
    if step == 0:
        raise ValueError("state.step=0: no step of training has been taken; to round at once, use quantize_params")
    if step < state.settled:
        raise ValueError(
            f"state.step={step}, but rounding changes until step {state.settled} of its schedule; train on, or with a "
            "shorter schedule"
        )
    named = dict(named_leaves(params, is_qtensor))
    _check(named, state, recipe)
    found = {t.path: _one(named[t.path], t, state) for t in state.weights}
    structure = jax.tree.structure(params, is_leaf=is_qtensor)
    return jax.tree.unflatten(structure, [found.get(path, leaf) for path, leaf in named.items()])


def _check(named: dict[str, Any], state: QATState, recipe: Any) -> None:
    trained = {t.path: t.config for t in state.weights}
    missing = next((path for path in trained if path not in named), None)
    if missing is not None:
        raise ValueError(f"the parameters have no '{missing}', which was trained with rounded numbers")
    given = resolve(recipe, named, set(trained))
    for path in trained | given:
        if trained.get(path) != given.get(path):
            raise ValueError(f"recipe: '{path}' was trained as {trained.get(path)}, and is given {given.get(path)}")


def _one(leaf: Any, t: Taken, state: QATState) -> QTensor:
    own, seen = at(state.ranges, t.path), at(state.observed, t.path)
    for what, a in {"weights": leaf, **own}.items():
        if bad := int(count_not_finite(a)):
            raise ValueError(f"'{t.path}': {bad} of its {what} are not finite; go back to an earlier state")
    if seen and not bool(jnp.any(seen["seen"] > 0)):
        raise ValueError(f"'{t.path}': its input saw no token, so it has no static range; use a dynamic one")
    return _quantized(t, jnp.asarray(leaf), own, seen)


@functools.partial(jax.jit, static_argnums=0)
def _quantized(t: Taken, w: jax.Array, own: dict, seen: dict) -> QTensor:
    axes = {"contract": t.contract, "out": t.out, "in_shape": t.in_shape}
    q = QTensor.from_codes(*ranges.coded(w, t, own), t.spec, dtype=w.dtype, **axes)
    return _with_inputs(q, t, own, seen) if t.spec.static_activations else q


def _with_inputs(q: QTensor, t: Taken, own: dict, seen: dict) -> QTensor:
    activations = t.spec.activations
    assert activations is not None
    if t.learned:
        scale, zero = ranges.learned_input_qparams(t, own)
    else:  # a matrix that saw no token gets the widest range of the others
        some = seen["seen"] > 0
        low, high = (jnp.where(some, seen[k], edge(seen[k])) for k, edge in (("lowest", jnp.min), ("highest", jnp.max)))
        scale, zero = ranges.input_qparams(low, high, activations.spec, t.scale_dtype)
    shape = (*t.lead_shape, 1, *(1,) * len(t.out))
    zero = None if zero is None else jnp.round(zero).astype(jnp.int8).reshape(shape)
    return dataclasses.replace(q, input_scale=scale.reshape(shape), input_zero_point=zero)
