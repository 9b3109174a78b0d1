"""The handlers of training with rounded numbers: how weights are used, and products with rounded inputs.

The weights themselves are rounded before the function runs, so their payloads are dense, and every product but its
input stays as it is.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics import statistics
from jaxquant.numerics.spec import compute_dtype
from jaxquant.numerics.statistics import Moments
from jaxquant.transforms.tracing import compat, interpreter
from jaxquant.transforms.tracing.observer import Observer, dense_values, untracked
from jaxquant.transforms.tracing.products import Lookup, Product
from jaxquant.transforms.tracing.recorder import Recorder
from jaxquant.transforms.tracing.views import Factor

Round = Callable[[jax.Array, Any, Any], jax.Array]


class Users(Observer):
    """Records which products use a weight, and no numbers.

    Attributes:
      notes: as `Observer`'s; of all uses that are no product, lookup or renaming.
    """

    def __init__(self):
        super().__init__(jnp.uint32(0), None)

    def product(self, it, product: Product):
        """Notes the product."""
        self.record(it, product)
        return it.bind(product.eqn, dense_values(product.ins))

    def observe(self, it, product: Product) -> Moments:
        """Nothing, in the shape of moments."""
        return statistics.empty_moments(tuple(f.size for f in product.stack_factors), compute_dtype(product.x.dtype))


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How the inputs of the products of one weight are rounded.

    Attributes:
      key: weights with equal keys round one input alike.
      run: `run(rows, ranges, strength)`: rows `[*stack, T, K]` of inputs, rounded; `ranges` as below, `[*stack, 1, 1]`
        (or `[T, 1]`, of each row's expert).
      ranges: pytree of arrays `[*lead]`, along the weight's axes that stack matrices; or None.
      lead: those axes, ascending.
      observed: whether the extremes of its inputs are recorded.
      strength: `[]`, the share of rounding; None if it is whole.
    """

    key: Any
    run: Round
    ranges: Any
    lead: tuple[int, ...]
    observed: bool
    strength: jax.Array | None = None


class Rounder(Observer):
    """Rounds the inputs of products, by the path of the weight, and records the extremes of some."""

    def __init__(self, roundings: Mapping[str, Rounding]):
        super().__init__(jnp.uint32(0), None)
        self.roundings = roundings

    def product(self, it, product: Product):
        """The product with the rounded input."""
        rounding = self.roundings.get(product.view.path)
        ins = dense_values(product.ins)
        if rounding is None:
            return it.bind(product.eqn, ins)
        if rounding.ranges is not None or rounding.observed:
            why = untracked(product) if it.recorder.keeps else "it decides when a loop ends"
            if why is not None:
                raise TypeError(f"the product with '{product.view.path}' has no static range of inputs: {why}")
        if rounding.observed:
            self.record(it, product)
        key = ("rounded", id(product.x), id(product.groups), rounding.key, _dims(product))
        if rounding.ranges is not None:
            key = (*key, product.view.path, product.view.leads, *map(id, product.view.index))
        if key not in it.repeated:  # it is kept with what it was made of, so that ids stay theirs
            x = self._rounded(it, product, rounding)
            it.repeated[key] = ([x], None, (product.x, product.groups, product.view.index))
        (x,) = it.repeated[key][0]
        return it.bind(product.eqn, [x if value is product.x else value for value in ins])

    def lookup(self, it, lookup: Lookup, eqn, ins):
        """Rows of an embedding, which are rounded already."""
        return it.bind(eqn, dense_values(ins))

    def observe(self, it, product: Product) -> Moments:
        """The extremes alone."""
        still = dataclasses.replace(product, x=lax.stop_gradient(product.x))
        return statistics.extremes_alone(super().observe(it, still))

    def _rounded(self, it, product: Product, rounding: Rounding) -> jax.Array:
        ranges = jax.tree.map(lambda a: _of_product(it, product, rounding.lead, a), rounding.ranges)
        if product.groups is not None:
            groups, rows = product.groups, product.tokens
            ranges = jax.tree.map(lambda a: jnp.repeat(a, groups, total_repeat_length=rows)[:, None], ranges)
        else:
            ranges = jax.tree.map(lambda a: a[..., None, None], ranges)
        run = functools.partial(_on_rows, rounding.run, product)
        run = compat.compiler_sharded(run, product.x, jax.typeof(product.x).sharding.spec)
        return run(product.x, ranges, rounding.strength)


def _dims(product: Product) -> tuple:
    """Which axes of its input a product sums and batches over."""
    batch = tuple((d, tuple(f.size for f in product.view.axes[w])) for d, w in product.batch)
    return batch, tuple(sorted(d for d, _ in product.contract))


def _on_rows(run: Round, product: Product, x: jax.Array, ranges, strength) -> jax.Array:
    """`run` on x as `[*stack, T, K]`, and the result in the shape of x."""
    batch, free, contract = [d for d, _ in product.batch], product.free_dims, [d for d, _ in product.contract]
    order = [*batch, *free, *contract]
    moved = jnp.transpose(x, order)
    stack = [f.size for f in product.batch_factors]
    rows = moved.reshape(*stack, product.tokens, product.channels)
    result = run(rows, ranges, strength).reshape(moved.shape)
    return jnp.transpose(result, [order.index(d) for d in range(x.ndim)])


def _of_product(it, product: Product, lead: tuple[int, ...], a: jax.Array) -> jax.Array:
    """Of an array `[*lead]` along some axes of the weight, the part that a product uses: `[*its stack factors]`."""
    view, stack = product.view, product.stack_factors
    cut, sharded = dict(view.cut), dict(view.sharded)
    sizes: list[int] = []
    factors: list[Factor] = []
    for dim, axis in enumerate(lead):
        n = view.sizes[axis]
        if axis in sharded:
            a = lax.dynamic_slice_in_dim(a, lax.axis_index(sharded[axis]) * n, n, dim)
        elif (first := cut.get(axis)) is not None:
            a = lax.slice_in_dim(a, first, first + n, axis=dim)
        own = {f for f in (*stack, *(lead.factor for lead in view.leads)) if f.axis == axis}
        ordered = sorted(own, key=lambda f: -f.stride) or [Factor(axis, 1, n)]
        factors += ordered
        sizes += [f.size for f in ordered]
    a = a.reshape(sizes)
    loops = dict(it.loops)
    for taken in view.leads:
        if taken.factor in factors:
            if taken.how == "scan":
                at = loops[taken.loop]
            else:
                at = taken.at if taken.how == "static" else view.index[taken.at]
            place = factors.index(taken.factor)
            at = jnp.clip(jnp.reshape(at, ()), 0, sizes[place] - 1)
            a = lax.dynamic_index_in_dim(a, at, place, keepdims=False)
            del factors[place], sizes[place]
    rest = [f for f in factors if f not in stack]  # of size 1, or squeezed away
    order = [factors.index(f) for f in (*stack, *rest)]
    return jnp.transpose(a, order).reshape([f.size for f in stack])


def users(closed, leaves: list, arrays: list, chosen: Callable[[str, Any], bool]) -> tuple[Recorder, Users]:
    """How a traced function uses the weights that `chosen(path, leaf)` picks. Arguments as `interpreter.start`."""
    users, found = Users(), []

    def look(values, arrays):
        named = [(path, value) for (path, _), value in zip(leaves, values, strict=True)]
        outs, recorder = interpreter.start(users, closed, named, arrays, chosen)
        found.append(recorder)
        return users.results(outs)

    jax.eval_shape(look, [leaf for _, leaf in leaves], arrays)
    return dataclasses.replace(found[0], moments=[], known={}), users
