"""A weight on its way through a jaxpr, and the operations that only rename it.

A view is the weight's payload (a dense array, or a QTensor whose arrays are never transposed) together with what the
program has done to it, statically: where each axis of the value that the program holds comes from.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp


class Factor(NamedTuple):
    """Part of an axis of the weight: positions stride·i, i < size. An axis of a view is factors, major to minor."""

    axis: int
    stride: int
    size: int


class Lead(NamedTuple):
    """A factor of the weight at which the program has taken one position.

    `at` is the static position, or the slot of the traced one in `View.index`. `loop` is the token of the scan that
    slices the factor, or of the innermost loop around the place where a traced position is taken (None outside loops).
    """

    factor: Factor
    how: Literal["scan", "static", "traced"]
    at: Any  # an int, but for a scan
    loop: int | None


class Take(NamedTuple):
    """A slice of one factor of the weight: `size` positions from `start`, or one position and the factor gone."""

    factor: Factor
    start: Any
    size: Any  # an int, or None


Axes = tuple[tuple[Factor, ...], ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["payload", "index"],
    meta_fields=["path", "axes", "sizes", "dtype", "leads", "cut", "sharded"],
)
@dataclasses.dataclass(frozen=True)
class View:
    """A weight as the program sees it.

    Attributes:
      payload: the dense value that the program holds, or a QTensor without the positions already taken.
      index: traced positions of the leads that have one, as the program has them: one integer each.
      path: of the weight in the parameter tree, "a/b/c".
      axes: per axis of the program's value, the factors it is made of. Axes of size 1 may be left out.
      sizes: of the weight's own axes (local ones inside `shard_map`, shorter where a slice cut them).
      dtype: name of the dtype that the program has cast the weight to.
      leads: factors at which one position was taken, outermost first.
      cut: (axis, first position) of each axis that a slice has shortened; None for a traced one.
      sharded: (axis, mesh axis name) of each axis that is split over devices inside `shard_map`.
    """

    payload: Any
    index: tuple
    path: str
    axes: Axes
    sizes: tuple[int, ...]
    dtype: str
    leads: tuple[Lead, ...] = ()
    cut: tuple[tuple[int, int | None], ...] = ()
    sharded: tuple[tuple[int, str], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the program's value."""
        return tuple(math.prod(f.size for f in a) for a in self.axes)

    def factor(self, dim: int) -> Factor | None:
        """The one factor that axis `dim` of the program's value is; None if it is several, or none of size 1."""
        return self.axes[dim][0] if len(self.axes[dim]) == 1 else None

    def whole(self, dim: int) -> int | None:
        """The weight's axis that axis `dim` of the program's value is, whole and alone; None if it is not."""
        f = self.factor(dim)
        return f.axis if f is not None and f.size == self.sizes[f.axis] else None

    @property
    def untouched(self) -> bool:
        """Whether the program's value is the weight itself."""
        return [self.whole(d) for d in range(len(self.axes))] == list(range(len(self.sizes))) and not self.cut


def make_view(path: str, leaf) -> View:
    """The view of a weight (array or QTensor) that enters a program."""
    axes = tuple((Factor(i, 1, n),) for i, n in enumerate(leaf.shape))
    return View(leaf, (), path, axes, tuple(leaf.shape), jnp.dtype(leaf.dtype).name)


def own_order(factors: list[Factor]) -> list[int]:
    """Places of the factors in the weight's own order: by axis, then major to minor."""
    return sorted(range(len(factors)), key=lambda i: (factors[i].axis, -factors[i].stride))


def regroup(axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    """The factors of each axis after a reshape; None if it mixes them. Factors of size 1 stay where one fits."""
    flat = [f for a in axes for f in a]
    result = []
    for n in shape:
        axis: list[Factor] = [flat.pop(0)] if n == 1 and flat and flat[0].size == 1 else []
        while n > 1:
            f = flat.pop(0)
            if f.size == 1:
                continue
            if n % f.size == 0:
                axis.append(f)
                n //= f.size
            elif f.size % n == 0:
                minor = f.size // n
                axis.append(Factor(f.axis, f.stride * minor, n))
                flat.insert(0, Factor(f.axis, f.stride, minor))
                n = 1
            else:
                return None
        result.append(_joined(axis))
    return tuple(result)


def _joined(factors: list[Factor]) -> tuple[Factor, ...]:
    """Neighbours that were one factor before a reshape split them become one again."""
    result: list[Factor] = []
    for f in factors:
        if result and result[-1].axis == f.axis and result[-1].stride == f.stride * f.size:
            result[-1] = Factor(f.axis, f.stride, result[-1].size * f.size)
        else:
            result.append(f)
    return tuple(result)


def taken(view: View, dim: int, take: Take) -> View:
    """The view after a slice of axis `dim`, which is one factor; its payload is not sliced yet."""
    f = take.factor
    at = take.start if isinstance(take.start, int) else None
    if take.size is None:
        slot = len(view.index)
        lead = Lead(f, "traced", slot, None) if at is None else Lead(f, "static", at, None)
        index = (*view.index, take.start) if at is None else view.index
        axes = (*view.axes[:dim], (), *view.axes[dim + 1 :])
        return dataclasses.replace(view, axes=axes, leads=(*view.leads, lead), index=index)
    before = dict(view.cut).get(f.axis, 0)
    first = None if at is None or before is None else before + at
    cut = {**dict(view.cut), f.axis: first}
    sizes = tuple(take.size if a == f.axis else n for a, n in enumerate(view.sizes))
    axes = (*view.axes[:dim], (Factor(f.axis, 1, take.size),), *view.axes[dim + 1 :])
    return dataclasses.replace(view, axes=axes, sizes=sizes, cut=tuple(cut.items()))


Step = tuple[View, list[Take]]  # a view of one result, and the slices that its payload needs
Steps = list[Step] | None  # one per result; None: not a renaming


def _transpose(view: View, eqn, ins) -> Steps:
    return [(dataclasses.replace(view, axes=tuple(view.axes[i] for i in eqn.params["permutation"])), [])]


def _reshape(view: View, eqn, ins) -> Steps:
    if eqn.params.get("dimensions") is not None:
        return None
    axes = regroup(view.axes, eqn.outvars[0].aval.shape)
    return None if axes is None else [(dataclasses.replace(view, axes=axes), [])]


def _squeeze(view: View, eqn, ins) -> Steps:
    kept = tuple(a for d, a in enumerate(view.axes) if d not in eqn.params["dimensions"])
    return [(dataclasses.replace(view, axes=kept), [])]


def _broadcast(view: View, eqn, ins) -> Steps:
    shape = eqn.outvars[0].aval.shape
    if math.prod(shape) != math.prod(view.shape):
        return None
    place = dict(zip(eqn.params["broadcast_dimensions"], view.axes, strict=True))
    return [(dataclasses.replace(view, axes=tuple(place.get(d, ()) for d in range(len(shape)))), [])]


def _convert(view: View, eqn, ins) -> Steps:
    dtype = jnp.dtype(eqn.params["new_dtype"])
    return [(dataclasses.replace(view, dtype=dtype.name), [])] if jnp.issubdtype(dtype, jnp.floating) else None


def _same(view: View, eqn, ins) -> Steps:
    return [(view, [])] if len(eqn.outvars) == 1 else None


def within(view: View, old: View, loop: int) -> View:
    """The view, with `loop` as the place where the traced positions that `old` did not have were taken."""
    new = [lead._replace(loop=loop) if lead.how == "traced" else lead for lead in view.leads[len(old.leads) :]]
    return dataclasses.replace(view, leads=(*old.leads, *new))


def _cut(view: View, shape: tuple[int, ...], starts) -> Step | None:
    """A slice of the program's value to `shape` from `starts`; None if an axis it cuts is no single factor."""
    takes = []
    for dim, n in enumerate(shape):
        if n == view.shape[dim]:
            continue
        f = view.factor(dim)
        if f is None or (n > 1 and view.whole(dim) is None):
            return None
        take = Take(f, starts[dim], None if n == 1 else n)
        view = taken(view, dim, take)
        takes.append(take)
    return view, takes


def _without(step: Step, dim: int) -> Step:
    return dataclasses.replace(step[0], axes=(*step[0].axes[:dim], *step[0].axes[dim + 1 :])), step[1]


def _slice(view: View, eqn, ins) -> Steps:
    if set(eqn.params["strides"] or [1]) != {1}:
        return None
    step = _cut(view, eqn.outvars[0].aval.shape, [int(i) for i in eqn.params["start_indices"]])
    return None if step is None else [step]


def _dynamic_slice(view: View, eqn, ins) -> Steps:
    shape = eqn.outvars[0].aval.shape
    last = [n - m for n, m in zip(view.shape, shape, strict=True)]
    starts = [_clamped(i, n) for i, n in zip(ins[1:], last, strict=True)]
    step = _cut(view, shape, starts)
    return None if step is None else [step]


def _clamped(i, last: int):
    """A start of a slice: where it is known an int, moved inside as XLA does."""
    return i if isinstance(i, jax.core.Tracer) else min(max(int(i), 0), last)


def _split(view: View, eqn, ins) -> Steps:
    dim, start, steps = eqn.params["axis"], 0, []
    for v in eqn.outvars:
        starts = [start if d == dim else 0 for d in range(len(view.axes))]
        steps.append(_cut(view, v.aval.shape, starts))
        start += v.aval.shape[dim]
    return [s for s in steps if s is not None] if None not in steps else None


def _unstack(view: View, eqn, ins) -> Steps:
    dim = eqn.params["axis"]
    shape = tuple(1 if d == dim else n for d, n in enumerate(view.shape))
    steps = [_cut(view, shape, [i if d == dim else 0 for d in range(len(shape))]) for i in range(view.shape[dim])]
    return [_without(s, dim) for s in steps if s is not None] if None not in steps else None


def _gather(view: View, eqn, ins) -> Steps:
    """`jnp.take` of one layer of a stack; rows of an embedding are looked up instead, see `products.as_lookup`."""
    indices, d = ins[1], eqn.params["dimension_numbers"]
    if isinstance(indices, View) or indices.shape != (1,) or len(view.axes) < 3 or len(d.start_index_map) != 1:
        return None
    (dim,) = d.start_index_map
    shape = tuple(1 if i == dim else n for i, n in enumerate(view.shape))
    if d.collapsed_slice_dims != (dim,) or d.operand_batching_dims or tuple(eqn.params["slice_sizes"]) != shape:
        return None
    step = _cut(view, shape, [indices if i == dim else 0 for i in range(len(shape))])
    return None if step is None else [_without(step, dim)]


RENAMINGS: dict[str, Callable[[View, Any, list], Steps]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _broadcast,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
    "gather": _gather,
    **dict.fromkeys(
        ("copy", "copy_p", "device_put", "name", "stop_gradient", "sharding_constraint", "reshard", "pvary", "pcast"),
        _same,
    ),
}
