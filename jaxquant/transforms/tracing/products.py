"""The operations that consume a weight: `dot_general`, `ragged_dot` and the gather of an embedding."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.transforms.tracing.views import Factor, View, own_order

DOT, RAGGED_DOT = "dot_general", "ragged_dot_general"  # primitives


@dataclasses.dataclass
class Product:
    """A product of a weight with an input, its axes paired by role.

    Attributes:
      view: the weight.
      x: the input.
      batch: pairs (axis of x, axis of the view) that the product runs over.
      contract: pairs that it sums over.
      group: axis of the view that the groups of a ragged product run over; else None.
      weight_first: whether the weight is the left operand, which decides the order of the result's axes.
      groups: rows of x per expert, `[E]`, of a ragged product; else None.
      eqn, ins: the equation and the values of its inputs.
    """

    view: View
    x: jax.Array
    batch: list[tuple[int, int]]
    contract: list[tuple[int, int]]
    group: int | None
    weight_first: bool
    groups: jax.Array | None
    eqn: Any
    ins: list

    @property
    def contract_axes(self) -> tuple[int, ...]:
        """The weight's own axes that are summed over, ascending."""
        return tuple(sorted({f.axis for _, d in self.contract for f in self.view.axes[d]}))

    @property
    def batch_factors(self) -> tuple[Factor, ...]:
        """The factors of the weight that are batched over, in the product's order."""
        return tuple(f for _, d in self.batch for f in self.view.axes[d])

    @property
    def stack_factors(self) -> tuple[Factor, ...]:
        """The factors of the weight that stack matrices: those batched over, or the one that groups run over."""
        return self.batch_factors if self.group is None else self.view.axes[self.group]

    @property
    def out_dims(self) -> list[int]:
        """The view's remaining axes, in its order."""
        paired = {d for _, d in self.batch + self.contract} | {self.group}
        return [d for d in range(len(self.view.axes)) if d not in paired]

    @property
    def out_axes(self) -> tuple[int, ...]:
        """The weight's own axes that stand in the result, ascending."""
        return tuple(sorted({f.axis for d in self.out_dims for f in self.view.axes[d]}))

    @property
    def free_dims(self) -> list[int]:
        """The axes of x that stand in the result."""
        paired = {d for d, _ in self.batch + self.contract}
        return [d for d in range(self.x.ndim) if d not in paired]

    @property
    def tokens(self) -> int:
        """Rows of x that each matrix is multiplied with."""
        return math.prod(self.x.shape[d] for d in self.free_dims)

    @property
    def channels(self) -> int:
        """Entries of a row of x."""
        return math.prod(self.x.shape[d] for d, _ in self.contract)

    def whole(self) -> bool:
        """Whether each contracting axis of the weight is summed over whole."""
        factors = [f for _, d in self.contract for f in self.view.axes[d]]
        sizes = {a: math.prod(f.size for f in factors if f.axis == a) for a in self.contract_axes}
        cut = dict(self.view.cut)
        return bool(sizes) and all(sizes[a] == self.view.sizes[a] and a not in cut for a in sizes)

    def rows(self, *, gathered: bool = False) -> jax.Array:
        """x as `[*batch factors, tokens, K]`, with K in the weight's own axis order.

        `gathered` first collects the shards of contracting axes that `shard_map` has split over devices.
        """
        x, mesh_names = self.x, dict(self.view.sharded)
        order = [d for d, _ in self.batch] + self.free_dims + [d for d, _ in self.contract]
        sizes = []  # of x's contracting axes, split into the weight's factors
        factors: list[Factor] = []
        for xd, wd in self.contract:
            parts = list(self.view.axes[wd])
            if gathered and parts and parts[0].axis in mesh_names:
                x = lax.all_gather(x, mesh_names[parts[0].axis], axis=xd, tiled=True)
            shards = x.shape[xd] // math.prod(f.size for f in parts)
            sizes += [f.size * (shards if i == 0 else 1) for i, f in enumerate(parts)]
            factors += parts
        x = jnp.transpose(x, order)
        n = len(self.batch) + len(self.free_dims)
        x = x.reshape(*x.shape[:n], *sizes)
        x = jnp.transpose(x, [*range(n), *(n + i for i in own_order(factors))])
        batch = [f.size for f in self.batch_factors]
        return x.reshape(*batch, math.prod(x.shape[len(self.batch) : n]), math.prod(sizes))

    def restore(self, result: jax.Array) -> jax.Array:
        """`[*batch factors, tokens, *weight's out axes]` -> the shape that the program expects."""
        nb, view = len(self.batch_factors), self.view
        factors = [f for d in self.out_dims for f in view.axes[d]]
        own = own_order(factors)
        free = [self.x.shape[d] for d in self.free_dims]
        result = result.reshape(*result.shape[:nb], *free, *(factors[i].size for i in own))
        w = [nb + len(free) + own.index(i) for i in range(len(factors))]
        x = list(range(nb, nb + len(free)))
        result = jnp.transpose(result, [*range(nb), *(w + x if self.weight_first else x + w)])
        return result.reshape(self.eqn.outvars[0].aval.shape)


def as_product(eqn, ins: list) -> Product | None:
    """The product that an equation with one view among its inputs is; None if it is none that is known."""
    if eqn.primitive.name == DOT:
        return _dot_general(eqn, ins)
    if eqn.primitive.name == RAGGED_DOT:
        return _ragged_dot(eqn, ins)
    return None


def _dot_general(eqn, ins):
    if all(isinstance(i, View) for i in ins):
        return None  # a product of two weights is neither's consumption
    weight_first = isinstance(ins[0], View)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    contract = list(zip(lhs_contract, rhs_contract, strict=True))
    batch = list(zip(lhs_batch, rhs_batch, strict=True))
    if weight_first:
        contract, batch = [p[::-1] for p in contract], [p[::-1] for p in batch]
    view, x = (ins[0], ins[1]) if weight_first else (ins[1], ins[0])
    return Product(view, x, batch, contract, None, weight_first, None, eqn, ins)


def _ragged_dot(eqn, ins):
    x, view, groups = ins
    n = eqn.params["ragged_dot_dimension_numbers"]
    (lhs_contract, rhs_contract), (lhs_batch, _) = n.dot_dimension_numbers
    if not isinstance(view, View) or isinstance(x, View) or isinstance(groups, View):
        return None
    rows = not lhs_batch and x.ndim == 2 and tuple(n.lhs_ragged_dimensions) == (0,)
    if not rows or len(view.axes) != 3 or len(n.rhs_group_dimensions) != 1:
        return None
    group = n.rhs_group_dimensions[0]
    contract = list(zip(lhs_contract, rhs_contract, strict=True))
    return None if view.factor(group) is None else Product(view, x, [], contract, group, False, groups, eqn, ins)


@dataclasses.dataclass
class Lookup:
    """A gather of whole rows of a weight by one index each, as `w[ids]` and `jnp.take(w, ids, axis)` make it.

    Attributes:
      axis: the weight's own axis that is indexed.
      ids: integer positions, any shape.
      fill: value for positions out of bounds; None where they are clamped or promised not to occur.
      offset_dims: where the row's axes stand in the result.
    """

    view: View
    axis: int
    ids: jax.Array
    fill: float | None
    offset_dims: tuple[int, ...]


def as_lookup(eqn, ins: list) -> Lookup | None:
    """The lookup that a gather from a view is; None if it is a gather of another kind."""
    view, indices = ins
    if not isinstance(view, View) or isinstance(indices, View):
        return None
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if len(d.start_index_map) != 1 or d.collapsed_slice_dims != d.start_index_map or d.operand_batching_dims:
        return None
    dim = d.start_index_map[0]
    rest = [n for i, n in enumerate(sizes) if i != dim]
    axis = view.whole(dim)
    if sizes[dim] != 1 or rest != [n for i, n in enumerate(view.shape) if i != dim] or axis is None:
        return None
    fill = None
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        fill = math.nan if fill is None else fill
    return Lookup(view, axis, indices[..., 0], fill, tuple(d.offset_dims))


def row_ids(eqn, ins: list) -> jax.Array | None:
    """The row of a matrix that a gather takes for each row of its result, `[rows]`; None if it takes something else."""
    operand, indices = ins
    d, whole = eqn.params["dimension_numbers"], (1, *operand.shape[1:])
    if d.start_index_map != (0,) or d.collapsed_slice_dims != (0,) or d.operand_batching_dims:
        return None
    rows = operand.ndim == indices.ndim == 2 and d.offset_dims == (1,) and eqn.params["slice_sizes"] == whole
    return indices[:, 0] if rows else None
