"""Turns any model function into one whose weights and inputs of products are rounded while it is trained."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.activations import round_input
from jaxquant.numerics.spec import ActivationSpec
from jaxquant.numerics.statistics import InputStatistics
from jaxquant.transforms.arguments import Static, is_hashable
from jaxquant.transforms.recipe import rules_of
from jaxquant.transforms.tracing import compat, interpreter
from jaxquant.transforms.tracing.assemble import assemble, used_axes
from jaxquant.transforms.tracing.recorder import Recorder
from jaxquant.transforms.tracing.rounder import Rounder, Rounding
from jaxquant.transforms.training import ranges
from jaxquant.transforms.training.schedule import MovingAverage, Schedule, mixed
from jaxquant.transforms.training.state import QATState, at, nested
from jaxquant.transforms.training.taken import Program, Taken, trace


def fake_quantized(
    fn: Callable,
    recipe: Any,
    *,
    schedule: Schedule | None = None,
    observer: MovingAverage | None = None,
) -> "FakeQuantized":
    """Transforms a model function for training with rounded numbers.

    Every weight that the recipe takes is replaced by what its codes stand for, once, before the function runs (outside
    of the loop over layers), and the inputs of its products are rounded where its spec says so. Backwards, rounding
    passes the gradient straight through, as far as half a step beyond the codes; the gradient also flows through the
    ranges: a weight's own extremes, those of a dynamic input, or learned ones (`jq.LSQ`). Nothing in the function
    changes, and it may be used under `jit`, `grad`, `vmap`, `scan`, `checkpoint` and on a mesh.

    Where the inputs of products are rounded, a function with a derivative rule of its own that takes a weight is
    differentiated as if it had none. Inside `shard_map`, each device rounds with the range of what it holds.

    Args:
      fn: as for `quantized`.
      recipe: as for `quantize_params`, of `jq.RTN(spec)` (ranges are extremes) and `jq.LSQ(spec)` (ranges are learned).
      schedule: when rounding begins and how; by default at once, whole.
      observer: how static ranges of inputs that are not learned follow what is seen.

    Returns:
      A `FakeQuantized`: call it as `fn`, or with a state for ranges that are learned or observed.

    Raises:
      ValueError: the recipe is none; and when called, a rule takes nothing, or a config cannot be trained.
      TypeError: (when called) a weight that is taken enters an operation that is no known product, lookup or renaming.
        The message names the primitive and the parameter's path.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> def apply(params, x):
      ...     return x @ params["w"]
      >>> params, x = {"w": jnp.array([[-7.0], [3.2]])}, jnp.array([[1.0, 2.0]])
      >>> fn = jq.fake_quantized(apply, jq.RTN(jq.int4(narrow_range=True)))
      >>> fn(params, x).tolist()  # of the weights -7 and 3
      [[-1.0]]
      >>> float(jax.grad(lambda params: fn(params, x).sum())(params)["w"][1, 0])
      2.0
    """
    rules = rules_of(recipe)
    frozen = tuple(tuple(rule) for rule in rules) if isinstance(recipe, list | tuple) else recipe
    settings = _Settings(frozen, Schedule() if schedule is None else schedule, observer or MovingAverage())
    return FakeQuantized(fn, settings)


@dataclasses.dataclass(frozen=True)
class _Settings:
    recipe: Any
    schedule: Schedule
    observer: MovingAverage


class FakeQuantized:
    """A model function trained with rounded numbers; made by `fake_quantized`."""

    def __init__(self, fn: Callable, settings: _Settings):
        self._fn, self._settings = fn, settings
        self._compiled = (_compiled_once if is_hashable(fn) else _compiled)(fn, settings)
        functools.update_wrapper(self, fn, updated=())

    def __call__(self, params, *inputs, **options):
        """The function with rounded numbers, whole: the schedule at its end. Arguments and result as those of `fn`.

        Raises:
          ValueError: there are ranges that are learned or observed: call `apply`.
        """
        arrays, rest = Static.split((inputs, options))
        return self._compiled(params, None, arrays, rest)[0]

    def apply(self, params, state: QATState, *inputs, **options):
        """The function in one step of training.

        Args:
          params, inputs, options: as for `fn`.
          state: from `init`, or from the step before. For the gradient of learned ranges, replace `state.ranges` by
            what is differentiated.

        Returns:
          `(result, state)`: the state has seen one step more, and follows the inputs seen.

        Raises:
          ValueError: the state is of another recipe or of other parameters.
        """
        arrays, rest = Static.split((inputs, options))
        return self._compiled(params, state, arrays, rest)

    def init(self, params, *inputs, **options) -> QATState:
        """The state before the first step; ranges of inputs start from those of one batch.

        Args:
          params, inputs, options: as for `fn`.

        Raises:
          ValueError: a rule of the recipe takes nothing, or a config cannot be trained.
        """
        arrays, rest = Static.split((inputs, options))
        return _init(self._fn, self._settings, rest)(params, arrays)


def _init(fn: Callable, settings: _Settings, rest: Static) -> Callable:
    @jax.jit
    def run(params, arrays):
        inputs, options = rest.join(arrays)
        program = trace(functools.partial(fn, **options), params, inputs, settings.recipe)
        leaves = {path: jnp.asarray(leaf) for path, leaf in program.leaves}
        static = {t.path for t in program.weights if t.spec.static_activations}
        roundings = {path: Rounding(None, _untouched, None, (), observed=True) for path in static}
        _, seen = _interpreted(program, leaves, roundings)
        found: dict[str, dict] = {}
        observed: dict[str, dict] = {}
        for t in program.weights:
            if t.learned:
                found[t.path] = ranges.initial_ranges(leaves[t.path], t)
            if t.path in static:
                s = seen[t.path]
                low, high, mean = s.lowest[..., 0], s.highest[..., 0], s.mean_abs[..., 0]
                if t.learned:
                    found[t.path] |= ranges.initial_input_ranges(low, high, mean, t)
                else:
                    observed[t.path] = {"lowest": low, "highest": high, "seen": s.count}
        settled = max(settings.schedule.settled, settings.observer.start if observed else 0)
        return QATState(jnp.int32(0), nested(found), nested(observed), program.weights, settled)

    return run


def _untouched(rows: jax.Array, *_: Any) -> jax.Array:
    return rows


def _compiled(fn: Callable, settings: _Settings) -> Callable:
    @functools.partial(jax.jit, static_argnums=3)
    def compiled(params, state, arrays, rest):
        inputs, options = rest.join(arrays)
        program = trace(functools.partial(fn, **options), params, inputs, settings.recipe)
        _check(program, state)
        step = None if state is None else state.step
        leaves = _rounded_leaves(program, settings, state, step)
        rounded = [(t, t.spec.activations) for t in program.weights]
        roundings = {t.path: _rounding(t, a, settings, state, step) for t, a in rounded if a is not None}
        result, seen = _interpreted(program, leaves, roundings)
        return result, None if state is None else _next(state, seen, settings)

    return compiled


_compiled_once = functools.lru_cache(maxsize=64)(_compiled)


def _check(program: Program, state: QATState | None) -> None:
    for t in program.weights if state is None else ():
        if t.learned or t.spec.static_activations:
            what = "learned ranges" if t.learned else "a static range of inputs"
            raise ValueError(f"'{t.path}' has {what}: call apply(params, state, ...) with a state from init")
    if state is not None and state.weights != program.weights:
        raise ValueError("the state is of another recipe or of other parameters: make one with init(params, ...)")


def _rounded_leaves(program: Program, settings: _Settings, state, step) -> dict[str, Any]:
    leaves = dict(program.leaves)
    for t in program.weights:
        w, own = jnp.asarray(leaves[t.path]), {} if state is None else at(state.ranges, t.path)

        def run(w, own, step, t=t):
            spec, strength = t.spec, None
            if step is not None:
                spec, strength = settings.schedule.spec(spec, step), settings.schedule.strength(step)
            return mixed(w, ranges.round_weight(w, t, own, spec), strength)

        leaves[t.path] = compat.compiler_sharded(run, w, jax.typeof(w).sharding.spec)(w, own, step)
    return leaves


def _rounding(t: Taken, activations: ActivationSpec, settings: _Settings, state, step) -> Rounding:
    strength = None if step is None else settings.schedule.strength(step)
    if activations.static:
        return _static(t, activations, settings, state, strength)

    def dynamic(rows, _, strength):
        return mixed(rows, round_input(rows, None, activations), strength)

    return Rounding(activations, dynamic, None, t.lead, observed=False, strength=strength)


def _static(t: Taken, activations: ActivationSpec, settings: _Settings, state: QATState, strength) -> Rounding:
    if t.learned:
        qparams = ranges.learned_input_qparams(t, at(state.ranges, t.path))

        def learned(rows, qparams, strength):
            return mixed(rows, round_input(rows, qparams, activations), strength)

        return Rounding(t.path, learned, qparams, t.lead, observed=False, strength=strength)
    seen = at(state.observed, t.path)
    qparams = ranges.input_qparams(seen["lowest"], seen["highest"], activations.spec, t.scale_dtype)
    if settings.observer.start:
        begun = (state.step >= settings.observer.start).astype(jnp.float32)
        strength = begun if strength is None else begun * strength
    own = dataclasses.replace(activations, static=False)

    def observed(rows, of_product, strength):
        qparams, unseen = of_product  # as experts are that have had no token yet
        rounded = jnp.where(unseen, round_input(rows, None, own), round_input(rows, qparams, activations))
        return mixed(rows, rounded, strength)

    return Rounding(t.path, observed, (qparams, seen["seen"] == 0), t.lead, observed=True, strength=strength)


def _interpreted(program: Program, leaves: dict[str, Any], roundings: dict[str, Rounding]):
    """The function's result, and statistics of inputs by path, of those that are observed."""
    values = [leaves[path] for path, _ in program.leaves]
    if not roundings:
        outs = compat.run(program.closed)(*values, *program.arrays)
        return jax.tree.unflatten(program.structure, outs), {}
    rounder, named = Rounder(roundings), list(leaves.items())
    outs, recorder = interpreter.start(
        rounder, program.closed, named, program.arrays, lambda path, _: path in roundings
    )
    return jax.tree.unflatten(program.structure, rounder.results(outs)), _statistics(recorder, program)


def _statistics(recorder: Recorder, program: Program) -> dict[str, InputStatistics]:
    axes, _ = used_axes(recorder.uses, {t.path: t.shape for t in program.weights})
    return {path: assemble(inputs, recorder.moments, last=False) for path, (_, _, inputs) in axes.items()}


def _next(state: QATState, seen: dict[str, InputStatistics], settings: _Settings) -> QATState:
    decay, observed = settings.observer.decay, {}
    for path, new in seen.items():
        old = at(state.observed, path)
        some, first = new.count > 0, old["seen"] == 0

        def follow(old, new, some=some, first=first):
            return jnp.where(some, jnp.where(first, new, decay * old + (1 - decay) * new), old)

        low, high = (follow(old[name], getattr(new, name)[..., 0]) for name in ("lowest", "highest"))
        observed[path] = {"lowest": low, "highest": high, "seen": old["seen"] + new.count}
    return dataclasses.replace(state, step=state.step + 1, observed=nested(observed))
