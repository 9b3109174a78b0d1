"""The handler that records the inputs of products, while the model itself runs unchanged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxquant.numerics import statistics
from jaxquant.numerics.statistics import Moments
from jaxquant.transforms.tracing import compat, interpreter
from jaxquant.transforms.tracing.products import Lookup, Product
from jaxquant.transforms.tracing.recorder import Use
from jaxquant.transforms.tracing.views import Factor, View

MAX_CHANNELS = 2**16  # of one product's input; the Gram matrix of more would take over 17 GB


class Observer:
    """Records moments of the inputs of products.

    Attributes:
      position: uint32, of the batch's first token in the calibration stream.
      real: bool, True for tokens and False for padding; None if there is no padding.
      notes: (path, what happened) of uses that could not be followed.
      lookups: paths of weights whose rows are looked up.
    """

    def __init__(self, position: jax.Array, real: jax.Array | None):
        self.position, self.real = position, real
        self.notes: list[tuple[str, str]] = []
        self.lookups: set[str] = set()

    def rename(self, it, steps, eqn, ins):
        """The operation itself gives the new payloads."""
        outs = it.bind(eqn, dense_values(ins))
        return [dataclasses.replace(view, payload=out) for (view, _), out in zip(steps, outs, strict=True)]

    def lookup(self, it, lookup: Lookup, eqn, ins):
        """Rows of an embedding are noted, and keep no statistics."""
        self.lookups.add(lookup.view.path)
        return it.bind(eqn, dense_values(ins))

    def dense(self, eqn, values, why):
        """Harmless, because the weights are dense; noted."""
        self.notes += [(path, f"`{eqn.primitive.name}`: {why}") for path in interpreter.paths_of(values)]
        return dense_values(values)

    def results(self, outs: list) -> list[jax.Array]:
        """The results of the function."""
        return dense_values(outs)

    def product(self, it, product: Product):
        """Records the input of a product."""
        why = untracked(product) if it.recorder.keeps else "it decides when a loop ends"
        if why is not None:
            return it.other(product.eqn, product.ins, why)
        self.record(it, product)
        return it.bind(product.eqn, dense_values(product.ins))

    def record(self, it, product: Product) -> None:
        """Notes the use of the weight, and moments of the input unless they are known."""
        view = product.view
        stack = (*_local_positions(product), *product.stack_factors)
        starts = tuple((axis, at) for axis, at in view.cut if at is not None)
        follows = _follows(it, product)
        same = tuple(lead.factor for lead in view.leads if lead.how == "scan" and lead.loop not in follows)
        use = Use(view.path, product.contract_axes, product.out_axes, stack, view.leads, starts, same)
        arrays = (product.x, product.groups, *view.index)
        it.recorder.record(use, arrays, _signature(product), lambda: self._moments(it, product))

    def _moments(self, it, product: Product) -> Moments:
        moments = self.observe(it, product)
        for _ in _local_positions(product):
            moments = jax.tree.map(lambda a: a[None], moments)
        view = product.view
        for lead in reversed([lead for lead in view.leads if lead.how == "traced"]):
            moments = _scattered(moments, lead.factor.size, view.index[lead.at])
        return moments

    def observe(self, it, product: Product) -> Moments:
        """Moments of the input of one product, `[*factors that it stacks, ...]`."""
        observe = compat.compiler_sharded(functools.partial(_observe, product), product.x, PartitionSpec())
        position, real, again = self._tokens(it, product)
        groups = product.groups
        if again is not None:
            real = jnp.full(position.shape, ~again) if real is None else real & ~again
            groups = None if groups is None else jnp.where(again, 0, groups)
        return observe(product.x, groups, position, real)

    def _tokens(self, it, product: Product) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Each row's position in the stream, whether it is a token, and whether they all have been seen before.

        Iterations of a loop that does not run over layers count on, and so do the devices that tokens are split over.
        A loop that the input does not depend on brings the same tokens again and again.
        """
        own, follows = {lead.loop for lead in product.view.leads}, _follows(it, product)
        n, start, again = product.tokens, self.position, None
        for token, iteration in it.loops:
            if token not in own and token in follows:
                start = start + iteration.astype(jnp.uint32) * jnp.uint32(n)
            elif token not in own:
                again = (iteration > 0) if again is None else again | (iteration > 0)
        shard, shards = _shard(product)
        start = start + shard * jnp.uint32(n)
        return start + jnp.arange(n, dtype=jnp.uint32), self._real(it, product, shard, shards), again

    def _real(self, it, product: Product, shard: jax.Array, shards: int) -> jax.Array | None:
        if self.real is None:
            return None
        n, ids = _gathered_from(it, product)
        if ids is not None and n * shards == self.real.size:
            return lax.dynamic_slice_in_dim(self.real.reshape(-1), shard * jnp.uint32(n), n)[ids]
        free = tuple(product.x.shape[d] for d in product.free_dims)
        rows = (free[0] * shards, *free[1:]) if free else ()
        if product.groups is None and rows in (self.real.shape, (self.real.size,)):
            return lax.dynamic_slice_in_dim(self.real.reshape(-1), shard * jnp.uint32(product.tokens), product.tokens)
        note = f"the mask {list(self.real.shape)} does not fit its input rows {list(rows)}, which all count as tokens"
        self.notes.append((product.view.path, note))
        return None


def _observe(product: Product, x, groups, position, real) -> Moments:
    rows = dataclasses.replace(product, x=x).rows(gathered=True)
    if groups is not None:
        return statistics.observe_groups(rows, position, groups, real)
    observe = statistics.observe
    for _ in product.batch_factors:
        observe = jax.vmap(observe, in_axes=(0, None, None))
    return observe(rows, position, real)


def _gathered_from(it, product: Product) -> tuple[int, jax.Array | None]:
    """How many rows there were, of which a ragged product takes some in another order, and which; None if unknown.

    Known is an input that was gathered, and what is multiplied after it in the same groups.
    """
    if product.groups is None:
        return 0, None
    _, n, ids = it.gathered.get(id(product.x)) or it.gathered.get(id(product.groups), (None, 0, None))
    if ids is None or len(ids) != product.tokens:
        return 0, None
    it.gathered[id(product.groups)] = product.groups, n, ids
    return n, ids


def _follows(it, product: Product) -> frozenset:
    """The loops from whose iterations the input of a product follows."""
    depends = zip(it.depends_of(product.eqn), product.ins, strict=True)
    return it.base.union(*(loops for loops, value in depends if not isinstance(value, View)))


def _shard(product: Product) -> tuple[jax.Array, int]:
    """The number of this device's share of the tokens, and how many shares there are."""
    shard, shards = jnp.uint32(0), 1
    for name in _token_axes(product):
        size = lax.axis_size(name)
        shard, shards = shard * size + lax.axis_index(name).astype(jnp.uint32), shards * size
    return shard, shards


def _token_axes(product: Product) -> list[str]:
    """The mesh axes over which tokens are split, not the weight."""
    weights = {name for _, name in product.view.sharded}
    return [name for name in compat.mesh_axes(product.x) if name not in weights]


def _local_positions(product: Product) -> dict[Factor, str]:
    """Axes that are split over devices until each has one position, which the program has then squeezed away.

    With the names of the mesh axes.
    """
    view = product.view
    leads = {lead.factor.axis for lead in view.leads} | {f.axis for f in product.stack_factors}
    named = leads | set(product.contract_axes) | set(product.out_axes)
    return {Factor(axis, 1, 1): name for axis, name in view.sharded if axis not in named}


def untracked(product: Product) -> str | None:
    """Why no statistics can be kept of a product; None if they can."""
    view, cut, sharded = product.view, dict(product.view.cut), dict(product.view.sharded)
    stacking = [*product.stack_factors, *(lead.factor for lead in view.leads)]
    if any(f.axis in cut and cut[f.axis] is None for f in stacking):
        return "it takes a part of the weight's layers that starts at a traced position"
    if any(f.axis in sharded and f.size < view.sizes[f.axis] for f in stacking) or any(
        lead.factor.axis in sharded and lead.how != "scan" for lead in view.leads
    ):
        return "it takes a part of an axis that is split over devices"
    for _, dim in product.contract:
        for i, f in enumerate(view.axes[dim]):
            if f.axis in sharded and (i > 0 or f.size < view.sizes[f.axis]):
                return "an axis that is split over devices is mixed with others"
    channels = product.channels
    return f"a Gram matrix of {channels} channels would be too large" if channels > MAX_CHANNELS else None


def _signature(product: Product) -> tuple:
    """Two products of the same arrays whose signatures agree have the same moments."""
    view = product.view
    ranks = {axis: i for i, axis in enumerate(product.contract_axes)}
    order = tuple((xd, tuple((ranks[f.axis], f.stride, f.size) for f in view.axes[wd])) for xd, wd in product.contract)
    batch = tuple((xd, tuple(f.size for f in view.axes[wd])) for xd, wd in product.batch)
    leads = tuple((lead.how, lead.loop, lead.factor.size) for lead in view.leads if lead.how != "static")
    shards = tuple((ranks[axis], name) for axis, name in view.sharded if axis in ranks)
    return order, batch, leads, shards, tuple(_local_positions(product).values()), tuple(_token_axes(product))


def dense_values(ins: list) -> list:
    """The values, with the dense payloads of views."""
    return [v.payload if isinstance(v, View) else v for v in ins]


def _scattered(moments: Moments, n: int, at) -> Moments:
    """Moments of one position of an axis of n, with nothing at the others."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), moments)
    return jax.tree.map(
        lambda zeros, a: zeros.at[jnp.clip(at, 0, n - 1)].set(a), statistics.empty_like(shapes), moments
    )
