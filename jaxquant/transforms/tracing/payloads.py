"""QTensors as payloads of views: their arrays stay canonical, `[*lead, ·, *out]`, whatever the program does.

Only taking positions along leading and output axes touches the arrays; everything else is bookkeeping of the view.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels.reference import dense
from jaxquant.numerics.qtensor import QTensor
from jaxquant.transforms.tracing.views import Factor, Lead, Take, View


def _own(axes: tuple[int, ...], view: View) -> list[int]:
    return [a + len(view.sizes) for a in axes]


def contract_axes(view: View) -> tuple[int, ...]:
    """The weight's own axes that its QTensor was quantized along."""
    return tuple(_own(view.payload.contract, view))


def payload_leads(view: View) -> list[int]:
    """The weight's leading axes that its QTensor still has, in the order of its arrays' axes."""
    gone = {*_own(view.payload.contract + view.payload.out, view), *(lead.axis for lead in view.leads)}
    return [a for a in range(len(view.sizes)) if a not in gone]


def payload_axis(view: View, axis: int) -> int | None:
    """The axis of a QTensor's arrays that holds an axis of the weight; None for contracting axes."""
    leads, out = payload_leads(view), _own(view.payload.out, view)
    if axis in leads:
        return leads.index(axis)
    return len(leads) + 1 + out.index(axis) if axis in out else None


def take(view: View, step: Take) -> View | None:
    """The view with one slice applied to its QTensor; None along a contracting axis."""
    at = payload_axis(view, step.axis)
    if at is None:
        return None
    n = view.sizes[step.axis]

    def cut(a):
        whole = a.shape[at] == n  # otherwise it is the scale of a whole tensor, 1 along its output axes
        if step.size is None:
            return lax.dynamic_index_in_dim(a, step.start if whole else 0, at, keepdims=False)
        return lax.dynamic_slice_in_dim(a, step.start, step.size, at) if whole else a

    q = jax.tree.map(cut, view.payload)
    if step.size is not None:
        sizes = tuple(step.size if a == step.axis else size for a, size in enumerate(view.sizes))
        return dataclasses.replace(view, payload=q, sizes=sizes)
    q = dataclasses.replace(q, out=tuple(a for a in q.out if a + len(view.sizes) != step.axis))
    return dataclasses.replace(view, payload=q, leads=(*view.leads, Lead(step.axis, "static", 0)))


def with_leads(view: View, batch: tuple[int, ...]) -> QTensor | None:
    """The QTensor with exactly the leading axes `batch`, in that order, in the view's dtype; None if it has others."""
    leads = payload_leads(view)
    rest = [a for a in leads if a not in batch]
    if not set(batch) <= set(leads) or any(view.sizes[a] > 1 for a in rest):
        return None  # a leading axis of size 1 may have been squeezed away without a trace
    order = [leads.index(a) for a in (*rest, *batch)]

    def arranged(a):
        a = jnp.transpose(a, [*order, *range(len(leads), a.ndim)])
        return a.reshape(a.shape[len(rest) :])

    return dataclasses.replace(jax.tree.map(arranged, view.payload), dtype=view.dtype)


def densify(view: View) -> jax.Array:
    """The dense value that the program holds in the view's place, in the view's dtype."""
    q = view.payload
    leads, n_out = payload_leads(view), len(q.out)
    w = dense(dataclasses.replace(q, dtype=view.dtype))
    w = w.reshape(*w.shape[: len(leads)], *q.in_shape, *w.shape[w.ndim - n_out :])
    held = [*leads, *_own(q.contract, view), *_own(q.out, view)]
    factors = [f for dim in view.axes for f in dim]
    own = sorted(range(len(factors)), key=lambda i: (held.index(factors[i].axis), -factors[i].stride))
    w = w.reshape([factors[i].size for i in own])  # axes of size 1 that were squeezed away vanish here
    return jnp.transpose(w, [own.index(i) for i in range(len(factors))]).reshape(view.shape)


def take_rows(view: View, axis: int, ids: jax.Array) -> jax.Array | None:
    """Dequantized rows at positions `ids` along an axis of the weight, clamped to its bounds.

    Returns `[*ids, *the view's other axes]`, or None along a contracting axis. Only the rows asked for are dequantized.
    """
    at = payload_axis(view, axis)
    if at is None:
        return None
    n, flat = view.sizes[axis], ids.reshape(-1)
    q = jax.tree.map(lambda a: jnp.take(a, flat, at, mode="clip") if a.shape[at] == n else a, view.payload)
    dim = next(d for d in range(len(view.axes)) if view.whole(d) == axis)
    sizes = tuple(flat.size if a == axis else size for a, size in enumerate(view.sizes))
    axes = tuple((Factor(axis, 1, flat.size),) if d == dim else f for d, f in enumerate(view.axes))
    rows = jnp.moveaxis(densify(dataclasses.replace(view, payload=q, sizes=sizes, axes=axes)), dim, 0)
    return rows.reshape(*ids.shape, *rows.shape[1:])
