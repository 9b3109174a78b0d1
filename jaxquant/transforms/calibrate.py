"""One pass over calibration data records, for each weight, statistics of what it is multiplied with."""

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.numerics import statistics
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.statistics import InputStatistics, Moments
from jaxquant.transforms import memory
from jaxquant.transforms.memory import MemoryEstimate
from jaxquant.transforms.recipe import resolve
from jaxquant.transforms.tracing import compat, interpreter
from jaxquant.transforms.tracing.assemble import Inputs, assemble, used_axes
from jaxquant.transforms.tracing.observer import Observer
from jaxquant.transforms.tracing.recorder import Recorder


@dataclasses.dataclass(frozen=True)
class ProductStatistics:
    """How a model function uses one weight.

    Attributes:
      contract: the weight's axes that its product sums over, ascending.
      out: its axes that stand in the product's result, ascending; all others stack layers or experts.
      inputs: statistics of the product's input, with the stacking axes in the weight's order. Weights that share an
        input share this object.
    """

    contract: tuple[int, ...]
    out: tuple[int, ...]
    inputs: InputStatistics


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What one calibration pass has learned.

    Attributes:
      products: per path, of each weight that a product consumes.
      lookups: paths of weights whose rows are looked up (embeddings).
      notes: (path, what happened) of uses of a weight that could not be followed; they take no part in statistics.
    """

    products: Mapping[str, ProductStatistics]
    lookups: frozenset[str]
    notes: tuple[tuple[str, str], ...]


def types_of_statistics(fn: Callable, params: Any, batch: Any, recipe: Any) -> Statistics:
    """What `calibrate` would give, with types in place of arrays, by tracing alone. Arguments and errors as there."""
    program = _Program(fn, params, batch, None, recipe)

    def typed(inputs: Inputs, _) -> Any:
        return jax.eval_shape(lambda total: assemble(inputs, total, False), program.types)

    return _statistics([program], typed)


def calibrate(
    fn: Callable,
    params: Any,
    batches: Iterable[Any],
    *,
    recipe: Any = None,
    mask: Callable[[Any], jax.Array] | None = None,
) -> Statistics:
    """Runs a model function over calibration batches and records the statistics of every product with a weight.

    Every method reads these statistics. One token in 16, chosen by a hash of its position in the stream, is held out of
    them, and a sample of those is kept to judge methods by. Tokens with an entry that is not finite are left out.

    How much memory it will take is logged, at level INFO of the logger "jaxquant", before the first batch runs.

    Args:
      fn: `fn(params, batch)`, any JAX function; its result is not used.
      params: its parameters, any pytree of arrays.
      batches: inputs, each a pytree of arrays; equal shapes compile once. Leaves that are no arrays are static.
      recipe: as for `quantize_params`; given, only the weights it takes keep statistics, which saves memory.
      mask: `mask(batch)` is True (or not zero) for tokens and False for padding, shaped like the tokens (`[batch,
        time]`). Without it, every position is a token.

    Raises:
      ValueError: no batch, no token with finite inputs, no product with a weight, a recipe that takes nothing, or more
        memory needed than is available.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> def apply(params, x):
      ...     return x @ params["w"]
      >>> batches = [jnp.array([[1.0, -2.0], [3.0, 0.5]]), jnp.array([[0.0, 4.0], [1.0, 1.0]])]
      >>> stats = jq.calibrate(apply, {"w": jnp.ones((2, 3))}, batches)
      >>> stats.products["w"].inputs.absmax.tolist()
      [3.0, 4.0]
    """
    masked = ((batch, None if mask is None else jnp.asarray(mask(batch), bool)) for batch in batches)
    stats, _ = Calibration(fn, recipe).run(params, ((batch, real, tokens(batch, real)) for batch, real in masked))
    check_tokens([(product.inputs.count, product.inputs.dropped) for product in stats.products.values()])
    return stats


class Calibration:
    """A model function to calibrate, once or several times with different parameters of the same shapes.

    What was compiled for one kind of parameters and batches is kept.

    Args:
      fn, recipe: as for `calibrate`.
      keep: what `run` returns of the function's result for each batch; None returns nothing of it.
      level: at which the memory it takes is logged.
    """

    def __init__(
        self,
        fn: Callable,
        recipe: Any = None,
        *,
        keep: Callable[[Any], Any] | None = None,
        level: int = logging.INFO,
    ):
        self._fn, self._recipe, self._keep, self._level = fn, recipe, keep, level
        self._programs: dict[tuple, _Program] = {}

    def run(self, params: Any, batches: Iterable[tuple[Any, jax.Array | None, int]]) -> tuple[Statistics, list]:
        """One pass over batches, each with its mask or None and its `tokens`.

        Returns the statistics, and what is kept of the function's results. Errors as `calibrate`, but that nothing is
        said of products that saw no token: see `check_tokens`.
        """
        used: list[_Program] = []
        total, position, results = None, 0, []
        kind = interpreter.kind_of(params)
        for batch, real, count in batches:
            program = self._program(
                (kind, *interpreter.kind_of((batch, real))), params, batch, real, begun=total is not None
            )
            if program not in used:
                used.append(program)
            if program.uses != used[0].uses:
                raise ValueError("the model function uses its weights differently for batches of different shapes")
            jax.block_until_ready(total)  # or statistics of several batches would wait in memory
            total, result = program.add(program.nothing() if total is None else total, params, batch, position, real)
            results.append(result)
            position += count
        if total is None:
            raise ValueError("calibration needs at least one batch, but `batches` is empty")
        return _statistics(used, lambda inputs, last: assemble(inputs, total, last)), results

    def prepare(self, params: Any, batch: Any, real: jax.Array | None) -> MemoryEstimate:
        """Compiles what runs for batches of one kind, and returns what it will allocate. Errors as `calibrate`."""
        return self._program(
            (interpreter.kind_of(params), *interpreter.kind_of((batch, real))), params, batch, real, begun=False
        ).needed

    def _program(self, kind: tuple, params, batch, real: jax.Array | None, begun: bool) -> "_Program":
        key = (kind, *interpreter.kind_of((batch, real)))
        if key not in self._programs:
            program = _Program(self._fn, params, batch, real, self._recipe, self._keep)
            program.needed = program.memory(params, batch, real, begun)
            memory.ensure_fits(program.needed, params, self._level)
            self._programs[key] = program
        return self._programs[key]


def tokens(batch: Any, real: jax.Array | None) -> int:
    """Tokens in a batch: entries of the mask, or of the first array, whose last axis does not count if it is float."""
    if real is not None:
        return real.size
    for a in jax.tree.leaves(batch):
        if interpreter.traceable(a) and a.ndim:
            return math.prod(a.shape[:-1] if jnp.issubdtype(a.dtype, jnp.floating) else a.shape)
    return 0


class _Program:
    """The model function, interpreted and compiled for one kind of batch."""

    needed: MemoryEstimate

    def __init__(self, fn, params, batch, real, recipe, keep=None):
        closed, structure, leaves, arrays = interpreter.trace(fn, params, (batch,))
        self.sizes = {path: np.shape(leaf) for path, leaf in leaves}
        own = dict(interpreter.named_leaves(params, is_qtensor))  # without the parts of what is quantized already
        matrices = {path for path, leaf in leaves if path in own and interpreter.is_matrix(leaf)}
        taken = matrices if recipe is None else set(resolve(recipe, self.sizes, matrices))

        def moments(total, values, arrays, position, real):
            observer, recorder = Observer(position, real), Recorder(total=total)
            named = [(path, value) for (path, _), value in zip(leaves, values, strict=True)]
            outs, _ = interpreter.start(observer, closed, named, arrays, lambda path, _: path in taken, recorder)
            self.uses, self.notes, self.lookups = recorder.uses, observer.notes, observer.lookups
            result = jax.tree.unflatten(structure, observer.results(outs))
            return recorder.merged(), None if keep is None else keep(result)

        args = [leaf for _, leaf in leaves], arrays, jnp.uint32(0), real
        _, (self.types, self._result_types) = compat.stage(moments, None, *args)
        if not self.uses:
            raise ValueError("the function multiplies nothing with a weight of `params`: there is nothing to calibrate")
        run, _ = compat.stage(moments, self.types, *args)
        empty = lambda: [statistics.empty_like(m) for m in self.types]  # noqa: E731
        self._empty = jax.jit(empty, compiler_options=compat.COMPILER_OPTIONS)  # one program, not one for each shape
        self._compiled = jax.jit(run, donate_argnums=0, compiler_options=compat.COMPILER_OPTIONS)

    def memory(self, params, batch, real: jax.Array | None, begun: bool) -> MemoryEstimate:
        """What `calibrate` allocates, beside the sums that it holds already if it has `begun`; compiles the program."""
        arrays = interpreter.arrays_of(batch)
        leaves = jax.tree.leaves(params)
        compiled = self._compiled.lower(self.types, leaves, arrays, jnp.uint32(0), real).compile()
        sums = memory.types_bytes(self.types)
        parts = {
            "statistics": 0 if begun else sums,
            # In the end the sums of layers that do not lie in one stack are copied into one.
            "activations or results": max(memory.compiled_bytes(compiled), sums),
            # What lies in NumPy's memory is moved for every batch.
            "copies of arguments": memory.types_bytes([a for a in (*leaves, *arrays) if isinstance(a, np.ndarray)]),
            "results": memory.types_bytes(self._result_types),
        }
        return MemoryEstimate(
            "calibrate",
            {what: size for what, size in parts.items() if size},
            "calibrate fewer weights at a time through a `recipe` that takes fewer, or use batches of fewer or shorter "
            "sequences",
        )

    def nothing(self) -> list[Moments]:
        """Moments of every site, of no tokens."""
        return self._empty()

    def add(self, total: list[Moments], params, batch, position: int, real: jax.Array | None) -> tuple[list, Any]:
        """Merges moments of every site over one batch into the total, which is used up; returns it and the result."""
        arrays = interpreter.arrays_of(batch)
        return self._compiled(total, jax.tree.leaves(params), arrays, jnp.uint32(position % 2**32), real)


def _statistics(programs: list[_Program], make: Callable[[Inputs, bool], Any]) -> Statistics:
    """The statistics that some programs found; `make(inputs, last)` gives those of one or several weights' inputs.

    `last` says whether no others are made of the same moments.
    """
    program, notes = programs[0], [note for p in programs for note in p.notes]
    found, contradictory = used_axes(program.uses, program.sizes)
    notes += contradictory
    distinct = dict.fromkeys(inputs for _, _, inputs in found.values())
    readers = collections.Counter(site for inputs in distinct for site in inputs.sites)
    shared = {inputs: make(inputs, all(readers[s] == 1 for s in inputs.sites)) for inputs in distinct}
    products = {path: ProductStatistics(contract, out, shared[i]) for path, (contract, out, i) in found.items()}
    lookups = frozenset[str]().union(*(p.lookups for p in programs))
    return Statistics(products, lookups, tuple(dict.fromkeys(notes)))


def check_tokens(seen: Sequence[tuple[jax.Array, jax.Array]]) -> None:
    """Raises ValueError if products, of which these are tokens counted and dropped, have seen none."""
    if not seen or any(jnp.any(count > 0) for count, _ in seen):
        return
    if any(jnp.any(dropped > 0) for _, dropped in seen):
        raise ValueError(
            "no calibration token has finite inputs to any product: a parameter holds NaN or infinity, or the batches "
            "hold something the function gives NaN for, such as token ids outside of the vocabulary"
        )
    raise ValueError("the batches hold no token, or `mask` leaves none: there is nothing to calibrate with")
