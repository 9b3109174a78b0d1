"""One pass over calibration data records, for each weight, statistics of what it is multiplied with."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxquant.numerics import statistics
from jaxquant.numerics.statistics import InputStatistics, Moments
from jaxquant.transforms.recipe import resolve
from jaxquant.transforms.tracing import compat, interpreter, products
from jaxquant.transforms.tracing.assemble import assemble
from jaxquant.transforms.tracing.recorder import Use
from jaxquant.transforms.tracing.views import View


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

    Args:
      fn: `fn(params, batch)`, any JAX function; its result is not used.
      params: its parameters, any pytree of arrays.
      batches: inputs, each a pytree of arrays; equal shapes compile once.
      recipe: as for `quantize_params`; given, only the weights it takes keep statistics, which saves memory.
      mask: `mask(batch)` is a bool array, True for tokens and False for padding, shaped like the tokens (`[batch,
        time]`). Without it, every position is a token.

    Raises:
      ValueError: no batch, no product with a weight, or a recipe that takes nothing.
    """
    program, total, programs = None, None, {}
    position = 0
    for batch in batches:
        real = None if mask is None else jnp.asarray(mask(batch))
        shapes = jax.tree.map(lambda a: (np.shape(a), str(jnp.result_type(a))), (batch, real))
        key = (jax.tree.structure((batch, real)), *map(str, jax.tree.leaves(shapes)))
        if key not in programs:
            programs[key] = _Program(fn, params, batch, real, recipe)
        if program is not None and programs[key].uses != program.uses:
            raise ValueError("the model function uses its weights differently for batches of different shapes")
        program = programs[key]
        total = program.empty() if total is None else total
        total = program.add(total, params, batch, jnp.uint32(position % 2**32), real)
        position += _tokens(batch, real)
    if program is None:
        raise ValueError("calibration needs at least one batch, but `batches` is empty")
    return program.finish(total)


def _tokens(batch, real) -> int:
    """Tokens in a batch: entries of the mask, of integer ids, or rows of floats."""
    if real is not None:
        return real.size
    leaves = [np.shape(a) if jnp.issubdtype(jnp.result_type(a), jnp.integer) else np.shape(a)[:-1]
              for a in jax.tree.leaves(batch)]  # fmt: skip
    return math.prod(leaves[0]) if leaves else 0


class _Program:
    """The model function, interpreted and compiled for one shape of batch."""

    def __init__(self, fn, params, batch, real, recipe):
        closed, _, leaves, arrays = interpreter.trace(fn, params, (batch,))
        self.sizes = {path: np.shape(leaf) for path, leaf in leaves}
        matrices = {path for path, leaf in leaves if _is_matrix(leaf)}
        taken = matrices if recipe is None else set(resolve(recipe, self.sizes, matrices))

        def moments(values, arrays, position, real):
            observer = Observer(position, real)
            named = [(path, value) for (path, _), value in zip(leaves, values, strict=True)]
            _, recorder = interpreter.start(observer, closed, named, arrays, lambda path, _: path in taken)
            self.recorder, self.observer = recorder, observer
            return recorder.moments

        def add(total, params, batch, position, real):
            arrays = [a for a in jax.tree.leaves(batch) if interpreter.traceable(a)]
            new = run(jax.tree.leaves(params), arrays, position, real)
            return [statistics.merge(a, b) for a, b in zip(total, new, strict=True)]

        values = [leaf for _, leaf in leaves]
        run, self.shapes = compat.stage(moments, values, arrays, jnp.uint32(0), real)
        self.add = jax.jit(add, donate_argnums=0)
        self.uses = self.recorder.uses
        if not self.uses:
            raise ValueError("the function multiplies nothing with a weight of `params`: there is nothing to calibrate")

    def empty(self) -> list[Moments]:
        return [statistics.empty_like(m) for m in self.shapes]

    def finish(self, total: list[Moments]) -> Statistics:
        products, notes = {}, list(self.observer.notes)
        shared: dict = {}
        for path in dict.fromkeys(use.path for use in self.uses):
            uses = {use: sites for use, sites in self.uses.items() if use.path == path}
            roles = {(use.contract, use.out) for use in uses}
            if len(roles) > 1:
                notes.append((path, f"products sum over different axes: {sorted(r[0] for r in roles)}"))
                continue
            ((contract, out),) = roles
            inputs = assemble(uses, total, self.sizes[path], shared)
            products[path] = ProductStatistics(contract, out, inputs)
        return Statistics(products, frozenset(self.observer.lookups), tuple(dict.fromkeys(notes)))


def _is_matrix(leaf) -> bool:
    return np.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


class Observer:
    """The handler that records the inputs of products; the model itself runs unchanged."""

    def __init__(self, position: jax.Array, real: jax.Array | None):
        self.position, self.real = position, real
        self.notes: list[tuple[str, str]] = []
        self.lookups: set[str] = set()

    def rename(self, it, view, takes, eqn, ins):
        """The operation itself gives the new payload."""
        return [dataclasses.replace(view, payload=it.bind(eqn, _dense(ins))[0])]

    def lookup(self, it, lookup, eqn, ins):
        """Rows of an embedding are noted, and keep no statistics."""
        self.lookups.add(lookup.view.path)
        return it.bind(eqn, _dense(ins))

    def other(self, it, eqn, ins, why):
        """Harmless while the weights are dense; noted."""
        self.notes += [(path, f"`{eqn.primitive.name}`: {why}") for path in interpreter.paths_of(ins)]
        return it.bind(eqn, _dense(ins))

    def product(self, it, product):
        """Records the input of a product."""
        view = product.view
        ragged = product.groups is not None
        batch = (products.ragged_axis(product),) if ragged else product.batch_axes
        if any(lead.how == "scan" and lead.axis in view.cut for lead in view.leads):
            return self.other(it, product.eqn, product.ins, "a scan runs over a part of the weight's layers")
        out = tuple(a for a in product.out_axes if a not in batch)
        use = Use(view.path, product.contract_axes, batch, out, view.leads)
        it.recorder.record(use, product.x, _signature(product), lambda: self._moments(it, product))
        return it.bind(product.eqn, _dense(product.ins))

    def _moments(self, it, product: products.Product) -> Moments:
        x = product.rows(gathered=True)
        position, real = self._positions(it, product, x.shape[-2]), self._real(product)
        if product.groups is not None:
            moments = statistics.observe_groups(x, position, product.groups)
        else:
            observe = statistics.observe
            for _ in product.batch:
                observe = jax.vmap(observe, in_axes=(0, None, None))
            moments = _replicated(observe, x)(x, position, real)
        view = product.view
        for lead in reversed([lead for lead in view.leads if lead.how == "traced"]):
            moments = _scattered(moments, view.sizes[lead.axis], view.index[lead.at])
        return moments

    def _positions(self, it, product, tokens: int) -> jax.Array:
        """Each row's position in the stream; iterations of a loop that does not run over layers count on."""
        own = {lead.at for lead in product.view.leads if lead.how == "scan"}
        start = self.position
        for token, iteration in it.loops:
            if token not in own:
                start = start + iteration.astype(jnp.uint32) * jnp.uint32(tokens)
        return start + jnp.arange(tokens, dtype=jnp.uint32)

    def _real(self, product) -> jax.Array | None:
        if self.real is None:
            return None
        free = tuple(product.x.shape[d] for d in product.free_dims)
        if product.groups is None and free in (self.real.shape, (self.real.size,)):
            return self.real.reshape(-1)
        self.notes.append(
            (product.view.path, f"the mask {list(self.real.shape)} does not fit its input rows {list(free)}")
        )
        return None


def _signature(product: products.Product) -> tuple:
    """Two products whose inputs are the same object and whose signatures agree have the same moments."""
    view = product.view
    order = tuple((xd, tuple((f.axis, f.stride, f.size) for f in view.axes[wd])) for xd, wd in product.contract)
    ranks = {axis: i for i, axis in enumerate(product.contract_axes)}
    order = tuple((xd, tuple((ranks[a], s, n) for a, s, n in parts)) for xd, parts in order)
    leads = tuple((lead.how, id(view.index[lead.at]) if lead.how == "traced" else lead.at, view.sizes[lead.axis])
                  for lead in view.leads if lead.how != "static")  # fmt: skip
    shards = tuple(name for axis, name in view.sharded if axis in product.contract_axes)
    return order, tuple(xd for xd, _ in product.batch), leads, shards, id(product.groups)


def _dense(ins: list) -> list:
    return [v.payload if isinstance(v, View) else v for v in ins]


def _replicated(observe, x):
    """Under a mesh with explicit axes, lets the compiler choose how to sum over sharded tokens."""
    mesh = jax.typeof(x).sharding.mesh
    if not any(t == AxisType.Explicit for t in mesh.axis_types):
        return observe
    return jax.sharding.auto_axes(observe, out_sharding=PartitionSpec(), axes=mesh.axis_names)


def _scattered(moments: Moments, n: int, at) -> Moments:
    """Moments of one position of an axis of n, with nothing at the others."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), moments)
    return jax.tree.map(lambda zeros, a: zeros.at[at].set(a), statistics.empty_like(shapes), moments)
