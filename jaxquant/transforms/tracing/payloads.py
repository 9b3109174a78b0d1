"""QTensors as payloads of views: their arrays stay `[*lead, ·, *out]`, whatever the program does.

Codes that are prepared for a platform may lie `[*lead, *out, ·]`. What would have to move their axes lays them out
plainly first; slices along leading axes, lookups of rows and products as they were quantized for do not.

Only taking positions along leading and output axes touches the arrays; everything else is bookkeeping of the view. An
axis of the weight that a reshape has split into several factors stays one axis of the arrays until its last factor is
taken.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxquant.numerics.affine import dense
from jaxquant.numerics.layout import canonical_order
from jaxquant.numerics.qtensor import QTensor
from jaxquant.transforms.tracing import compat
from jaxquant.transforms.tracing.views import Factor, Take, View, own_order, taken


def _own(axes: tuple[int, ...], view: View) -> list[int]:
    return [a + len(view.sizes) for a in axes]


def contract_axes(view: View) -> tuple[int, ...]:
    """The weight's own axes that its QTensor was quantized along."""
    return tuple(_own(view.payload.contract, view))


def _is_gone(view: View, axis: int) -> bool:
    """Whether positions were taken along a whole axis. (One of size 1 may be squeezed away, and is then still held.)"""
    sizes = [lead.factor.size for lead in view.leads if lead.factor.axis == axis]
    return bool(sizes) and math.prod(sizes) == view.sizes[axis]


def _held(view: View) -> tuple[list[int], list[int]]:
    """The weight's leading and output axes that its QTensor still has, in the order of its arrays' axes."""
    out = _own(view.payload.out, view)
    named = {*contract_axes(view), *out}
    return [a for a in range(len(view.sizes)) if a not in named and not _is_gone(view, a)], out


def payload_axis(view: View, axis: int) -> int | None:
    """The axis of a QTensor's arrays that holds an axis of the weight; None for contracting axes."""
    leads, out = _held(view)
    if axis in leads:
        return leads.index(axis)
    return len(leads) + 1 + out.index(axis) if axis in out else None


def _factors(view: View, axis: int) -> list[Factor]:
    """The factors of an axis that its QTensor still has, major to minor."""
    factors = sorted((f for dim in view.axes for f in dim if f.axis == axis), key=lambda f: -f.stride)
    return factors or [Factor(axis, 1, 1)]


def _sizes(factors: list[Factor], n: int) -> list[int]:
    """Sizes of the factors of an array's axis of size n, which is 1 in the scale of a whole tensor."""
    return [f.size if n > 1 else 1 for f in factors]


def _inside(start, n: int, size: int):
    """The start of a slice of n positions as XLA moves it inside; JAX's functions would count a negative one back."""
    return (
        jnp.clip(jnp.reshape(start, ()), 0, max(n - size, 0)) if isinstance(start, jax.Array) else min(start, n - size)
    )


def take(view: View, step: Take) -> View | None:
    """The view after a slice, with its QTensor sliced; None along a contracting axis."""
    at = payload_axis(view, step.factor.axis)
    if at is None:
        return None
    if at >= len(_held(view)[0]):
        view = _with_contract_first(view)
    factors = _factors(view, step.factor.axis)
    place = factors.index(step.factor)

    def one(a):
        sizes = _sizes(factors, a.shape[at])
        a = a.reshape(*a.shape[:at], *sizes, *a.shape[at + 1 :])
        start = _inside(step.start, sizes[place], 1)
        a = lax.dynamic_index_in_dim(a, start, at + place, keepdims=False)
        rest = sizes[:place] + sizes[place + 1 :]
        return a.reshape(*a.shape[:at], *([math.prod(rest)] if rest else []), *a.shape[at + len(rest) :])

    def several(a):
        start = _inside(step.start, a.shape[at], step.size)
        return lax.dynamic_slice_in_dim(a, start, step.size, at) if a.shape[at] > 1 else a

    q = jax.tree.map(one if step.size is None else several, view.payload)
    after = taken(view, view.axes.index((step.factor,)), step)
    out = tuple(a for a in q.out if not _is_gone(after, a + len(view.sizes)))
    return dataclasses.replace(after, payload=dataclasses.replace(q, out=out))


def _with_contract_first(view: View) -> View:
    q = view.payload
    return dataclasses.replace(view, payload=q.laid_out(None)) if q.contract_last else view


def arranged(view: View, batch: tuple[Factor, ...]) -> QTensor | None:
    """The QTensor with exactly the leading axes `batch`, in that order, and all others as outputs, in the view's dtype.

    The output axes stand in the weight's own order. None if a batch axis is a contracting one.
    """
    q, (leads, out) = view.payload, _held(view)
    before, after = ([f for a in axes for f in _factors(view, a)] for axes in (leads, out))
    places = {f: i + (i >= len(before)) for i, f in enumerate([*before, *after])}
    rest = [f for f in places if f not in batch]
    if not set(batch) <= set(places):
        return None
    order = [places[f] for f in batch] + [len(before)] + [places[rest[i]] for i in own_order(rest)]
    if order != list(range(q.values.ndim)):
        q = _with_contract_first(view).payload

    def one(a):
        k = len(leads)
        sizes = [[n for axis, n0 in zip(axes, ns, strict=True) for n in _sizes(_factors(view, axis), n0)]
                 for axes, ns in ((leads, a.shape[:k]), (out, a.shape[k + 1 :]))]  # fmt: skip
        a = jnp.transpose(a.reshape(*sizes[0], a.shape[k], *sizes[1]), order)
        return jnp.broadcast_to(a, (*(f.size for f in batch), *a.shape[len(batch) :]))

    axes = tuple(range(-len(rest) - len(q.contract), 0))
    roles = {"contract": axes[: len(q.contract)], "out": axes[len(q.contract) :]}
    q = q if q.contract_last else jax.tree.map(one, q)
    return dataclasses.replace(q, dtype=view.dtype, **roles)


def densify(view: View) -> jax.Array:
    """The dense value that the program holds in the view's place, in the view's dtype."""
    q, (leads, out) = view.payload, _held(view)
    w = dense(q).astype(view.dtype)
    held = [*leads, *contract_axes(view), *out]
    factors = [f for dim in view.axes for f in dim]
    own = sorted(range(len(factors)), key=lambda i: (held.index(factors[i].axis), -factors[i].stride))
    w = w.reshape([factors[i].size for i in own])  # axes of size 1 that were squeezed away vanish here
    return jnp.transpose(w, [own.index(i) for i in range(len(factors))]).reshape(view.shape)


def take_rows(view: View, axis: int, ids: jax.Array) -> jax.Array:
    """Dequantized rows at positions `ids` along a leading or output axis of the weight, clamped to its bounds.

    Returns `[*ids, *the view's other axes]`. Only the rows asked for are dequantized.
    """
    at = payload_axis(view, axis)
    assert at is not None
    n, flat = view.sizes[axis], ids.reshape(-1)
    q = view.payload

    def take_from(a, at):
        return jnp.take(a, flat, at, mode="clip") if a.shape[at] == n else a

    own = at - 1 if q.contract_last and at > len(_held(view)[0]) else at
    q = dataclasses.replace(jax.tree.map(lambda a: take_from(a, at), dataclasses.replace(q, values=None)),
                            values=take_from(q.values, own))  # fmt: skip
    dim = next(d for d in range(len(view.axes)) if view.whole(d) == axis)
    sizes = tuple(flat.size if a == axis else size for a, size in enumerate(view.sizes))
    axes = tuple((Factor(axis, 1, flat.size),) if d == dim else f for d, f in enumerate(view.axes))
    rows = jnp.moveaxis(densify(dataclasses.replace(view, payload=q, sizes=sizes, axes=axes)), dim, 0)
    return rows.reshape(*ids.shape, *rows.shape[1:])


def type_of(q: QTensor) -> jax.ShapeDtypeStruct:
    """The type of the dense weight that a QTensor stands for, sharded as its arrays are if their types say so."""
    sharding = None
    if compat.explicit_axes(q.values):
        own = jax.typeof(q.values).sharding
        k = q.values.ndim - 1 - len(q.out)
        split = [*own.spec]
        names = dict(enumerate([*split[:k], split[-1], *split[k:-1]] if q.contract_last else split))
        order = canonical_order(q.ndim, q.contract, q.out)
        spec = {axis: names.get(i if i <= k else i - len(q.contract) + 1) for i, axis in enumerate(order)}
        spec |= dict.fromkeys(order[k + 1 : k + len(q.contract)])  # a flattened axis is split along its first part
        sharding = NamedSharding(own.mesh, PartitionSpec(*(spec[a] for a in range(q.ndim))))
    return jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=sharding)
