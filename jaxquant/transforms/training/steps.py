"""One step of a training with rounded numbers, and many of them, stopped where a number is not finite."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.transforms.tracing.interpreter import path_name
from jaxquant.transforms.training.dampening import dampened
from jaxquant.transforms.training.fake_quantized import FakeQuantized
from jaxquant.transforms.training.state import QATState


@partial(jax.tree_util.register_dataclass, data_fields=["params", "qat", "optimizer"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a training needs to go on; a pytree, so Orbax saves and restores it.

    Attributes:
      params: the parameters, in float.
      qat: learned and seen ranges, and the step.
      optimizer: the state of the optimizer.
    """

    params: Any
    qat: QATState
    optimizer: Any


class Metrics(NamedTuple):
    """What came out of one step.

    Attributes:
      loss: float `[]`, before the step.
      gradient, update: int32, of each leaf of `{"params", "ranges"}` in order, how many entries of its gradient, and of
        what it would become, are not finite.
      finite: bool `[]`, whether the loss and all of those are; if not, the state is the one before.
    """

    loss: jax.Array
    gradient: jax.Array
    update: jax.Array
    finite: jax.Array


class NotFinite(FloatingPointError):
    """A training met a loss or a gradient that is not finite.

    Attributes:
      state: the last good one, before that step.
      step: which it was, from 0.
    """

    def __init__(self, message: str, state: TrainState, step: int):
        super().__init__(message)
        self.state, self.step = state, step


def train_state(
    fn: FakeQuantized, params: Any, optimizer: optax.GradientTransformation, *inputs: Any, **options: Any
) -> TrainState:
    """The state before the first step. It holds copies of the parameters, because a step uses its state up.

    Args:
      fn: from `fake_quantized`.
      params: its parameters.
      optimizer: from `qat_optimizer`.
      inputs, options: one batch, as for `fn`.

    Returns:
      A `TrainState`, whose arrays have the shapes and dtypes of the parameters.

    Raises:
      ValueError: a rule of the recipe takes nothing, or a rate of the optimizer is for what is not there.
    """
    params = jax.tree.map(jnp.array, params)
    qat = fn.init(params, *inputs, **options)
    return TrainState(params, qat, optimizer.init(_trained(params, qat)))


def _trained(params: Any, qat: QATState) -> dict[str, Any]:
    return {"params": params, "ranges": qat.ranges}


def train_step(
    fn: FakeQuantized,
    loss: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    *,
    dampening: float | Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes a compiled step of training.

    Args:
      fn: from `fake_quantized`; called with (params, batch).
      loss: `loss(result, batch, *others) -> []`.
      optimizer: from `qat_optimizer`.
      dampening: after each step, every rounded weight that has moved goes this share, 0 to 1, of the way to the value
        that its code stands for (after Nagel et al. 2022, arXiv:2203.08086); one that has just changed its code goes
        all the way (which is not the paper's). It keeps weights from going back and forth between two codes; without
        it, trainings of more than some hundred steps gain little. Or an optax schedule of it: a few thousandths,
        falling as the learning rate does, are a good start. It is for learned ranges (`jq.LSQ`), and for weights in
        float32 (in half precision so small a share is lost in rounding), and begins at the end of a `Schedule`. None:
        no weight is moved so.

    Returns:
      `step(state, batch, *others) -> (state, Metrics)`, which uses the memory of its state. Others are any pytrees that
      the loss reads, such as the parameters of a teacher.

    Raises:
      ValueError: `dampening` is a number and not within 0 and 1; in the first step, a range is not learned.
    """
    if not callable(dampening) and not 0 <= (dampening or 0) <= 1:
        raise ValueError(f"dampening={dampening!r} is a share of a distance; give 0 to 1, such as 0.005")

    def objective(trained, qat, batch, others):
        result, qat = fn.apply(trained["params"], dataclasses.replace(qat, ranges=trained["ranges"]), batch)
        return loss(result, batch, *others), qat

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch, *others):
        trained = _trained(state.params, state.qat)
        (value, qat), gradient = jax.value_and_grad(objective, has_aux=True)(trained, state.qat, batch, others)
        updates, moments = optimizer.update(gradient, state.optimizer, trained)
        trained = optax.apply_updates(trained, updates)
        bad = _not_finite_in(gradient), _not_finite_in(trained)  # dampening would give them codes
        if dampening is not None:
            trained |= {"params": _dampened(dampening, state, trained)}
        finite = jnp.isfinite(value) & jnp.all(jnp.stack(bad) == 0)
        after = TrainState(trained["params"], dataclasses.replace(qat, ranges=trained["ranges"]), moments)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return kept, Metrics(value, *bad, finite)

    return step


def _dampened(dampening: float | Callable, state: TrainState, trained: dict[str, Any]) -> Any:
    share = jnp.asarray(dampening(state.qat.step) if callable(dampening) else dampening, jnp.float32)
    qat = dataclasses.replace(state.qat, ranges=trained["ranges"])
    return dampened(state.params, trained["params"], qat, share)


def train(
    step: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    batches: Iterable[Any],
    *others: Any,
    watch: Callable[[TrainState, float], None] | None = None,
) -> TrainState:
    """Takes one step per batch.

    Args:
      step: from `train_step`.
      state: from `train_state`, or where a training was left; it is used up.
      batches: what `step` takes.
      others: the same for every step.
      watch: called with the state and the loss after each step, for example to save it.

    Returns:
      The state after the last batch.

    Raises:
      NotFinite: a loss or a gradient is not finite; it says where, and has the last good state.
    """
    for batch in batches:
        state, metrics = step(state, batch, *others)
        if not metrics.finite:
            raise _not_finite(state, metrics)
        if watch is not None:
            watch(state, float(metrics.loss))
    return state


def _not_finite_in(tree: Any) -> jax.Array:
    """How many entries of each leaf."""
    return jnp.stack([jnp.sum(~jnp.isfinite(a), dtype=jnp.int32) for a in jax.tree.leaves(tree)])


def _not_finite(state: TrainState, metrics: Metrics) -> NotFinite:
    step = int(state.qat.step)
    remedy = "lower the learning rate, or clip gradients"
    if not np.isfinite(float(metrics.loss)):
        what = f"the loss is {float(metrics.loss)}"
    elif np.any(metrics.gradient):
        what = f"{_first(state, metrics.gradient)} of its gradient are not finite"
    else:
        what = f"{_first(state, metrics.update)} would not be finite after it"
        remedy += ", or train in float32"
    return NotFinite(
        f"step {step}: {what}; {remedy}. The state before this step is in `state` of this error", state, step
    )


def _first(state: TrainState, counts: jax.Array) -> str:
    """The first leaf with a count, in words."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_trained(state.params, state.qat))
    i = int(np.flatnonzero(np.asarray(counts))[0])
    return f"'{path_name(leaves[i][0])}': {int(counts[i])} entries"
