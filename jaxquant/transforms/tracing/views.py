"""A weight on its way through a jaxpr, and the operations that only rename it.

A view is the weight's payload (a dense array, or a QTensor whose arrays are never transposed or reshaped) together
with what the program has done to it, statically: where each axis of the value that the program holds comes from.
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
    """An axis of the weight at which the program has taken one position.

    `at` is the token of the scan that slices it, the static position, or the slot of the traced one in `View.index`.
    """

    axis: int
    how: Literal["scan", "static", "traced"]
    at: int


class Take(NamedTuple):
    """A slice along one axis of the weight: `size` positions from `start`, or one position and the axis gone."""

    axis: int
    start: Any
    size: int | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["payload", "index"],
    meta_fields=["path", "axes", "sizes", "dtype", "leads", "cut", "sharded"],
)
@dataclasses.dataclass(frozen=True)
class View:
    """A weight as the program sees it.

    Attributes:
      payload: the dense value that the program holds, or a QTensor without the leading axes already taken.
      index: traced positions of the leads that have one.
      path: of the weight in the parameter tree, "a/b/c".
      axes: per axis of the program's value, the factors it is made of.
      sizes: of the weight's own axes (local ones inside `shard_map`, shorter where a slice cut them).
      dtype: name of the dtype that the program has cast the weight to.
      leads: axes at which one position was taken, outermost first.
      cut: axes that a slice has shortened.
      sharded: (axis, mesh axis name) of each axis that is split over devices inside `shard_map`.
    """

    payload: Any
    index: tuple
    path: str
    axes: tuple[tuple[Factor, ...], ...]
    sizes: tuple[int, ...]
    dtype: str
    leads: tuple[Lead, ...] = ()
    cut: frozenset = frozenset()
    sharded: tuple[tuple[int, str], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the program's value."""
        return tuple(math.prod(f.size for f in a) for a in self.axes)

    def whole(self, dim: int) -> int | None:
        """The weight's axis that axis `dim` of the program's value is, whole and alone; None if it is not."""
        factors = self.axes[dim]
        return factors[0].axis if len(factors) == 1 and factors[0].size == self.sizes[factors[0].axis] else None

    @property
    def untouched(self) -> bool:
        """Whether the program's value is the weight itself."""
        return [self.whole(d) for d in range(len(self.axes))] == list(range(len(self.sizes)))


def make_view(path: str, leaf) -> View:
    """The view of a weight (array or QTensor) that enters a program."""
    axes = tuple((Factor(i, 1, n),) for i, n in enumerate(leaf.shape))
    return View(leaf, (), path, axes, tuple(leaf.shape), jnp.dtype(leaf.dtype).name)


def regroup(axes: tuple[tuple[Factor, ...], ...], shape: tuple[int, ...]) -> tuple[tuple[Factor, ...], ...] | None:
    """The factors of each axis after a reshape; None if it mixes them."""
    flat = [f for a in axes for f in a if f.size != 1]
    result = []
    for n in shape:
        axis: list[Factor] = []
        while n > 1:
            f = flat.pop(0)
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
        result.append(tuple(axis))
    return tuple(result)


Step = tuple[View, list[Take]] | None  # the renamed view and the slices its payload needs; None: not a renaming


def _transpose(view: View, eqn, _) -> Step:
    return dataclasses.replace(view, axes=tuple(view.axes[i] for i in eqn.params["permutation"])), []


def _reshape(view: View, eqn, _) -> Step:
    shape = eqn.outvars[0].aval.shape
    axes = regroup(view.axes, shape) if math.prod(shape) == math.prod(view.shape) else None
    return None if axes is None else (dataclasses.replace(view, axes=axes), [])


def _convert(view: View, eqn, _) -> Step:
    dtype = jnp.dtype(eqn.params["new_dtype"])
    return (dataclasses.replace(view, dtype=dtype.name), []) if jnp.issubdtype(dtype, jnp.floating) else None


def _same(view: View, eqn, _) -> Step:
    return view, []


def _slice(view: View, eqn, ins) -> Step:
    if eqn.params["strides"] is not None and set(eqn.params["strides"]) != {1}:
        return None
    return _cut(view, eqn, eqn.params["start_indices"])


def _dynamic_slice(view: View, eqn, ins) -> Step:
    return _cut(view, eqn, [int(i) if not isinstance(i, jax.core.Tracer) else i for i in ins[1:]])


def _cut(view: View, eqn, starts) -> Step:
    takes = []
    for dim, n in enumerate(eqn.outvars[0].aval.shape):
        if n == view.shape[dim]:
            continue
        axis = view.whole(dim)
        if axis is None:
            return None
        take = Take(axis, starts[dim], None if n == 1 else n)
        view = _taken(view, dim, take)
        takes.append(take)
    return view, takes


def _taken(view: View, dim: int, take: Take) -> View:
    factors = () if take.size is None else (Factor(take.axis, 1, take.size),)
    axes = (*view.axes[:dim], factors, *view.axes[dim + 1 :])
    if take.size is not None:
        sizes = tuple(take.size if a == take.axis else n for a, n in enumerate(view.sizes))
        return dataclasses.replace(view, axes=axes, sizes=sizes, cut=view.cut | {take.axis})
    if isinstance(take.start, int):
        return dataclasses.replace(view, axes=axes, leads=(*view.leads, Lead(take.axis, "static", take.start)))
    lead = Lead(take.axis, "traced", len(view.index))
    return dataclasses.replace(view, axes=axes, leads=(*view.leads, lead), index=(*view.index, take.start))


RENAMINGS: dict[str, Callable[[View, Any, list], Step]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _reshape,
    "convert_element_type": _convert,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "copy": _same,
    "copy_p": _same,
    "device_put": _same,
    "sharding_constraint": _same,
    "pvary": _same,
    "pcast": _same,
}
