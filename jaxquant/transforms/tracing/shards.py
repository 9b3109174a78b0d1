"""The rule for `shard_map`: weights enter as local shards, statistics leave merged over the devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxquant.numerics import statistics
from jaxquant.numerics.packing import BLOCK
from jaxquant.numerics.qtensor import QTensor, is_packed
from jaxquant.numerics.statistics import Moments
from jaxquant.transforms.tracing import compat
from jaxquant.transforms.tracing.payloads import payload_axis
from jaxquant.transforms.tracing.recorder import Recorder, Use
from jaxquant.transforms.tracing.views import Factor, View


def call_shard_map(it, eqn, ins: list) -> list:
    """Runs the body on local views, and merges the moments of all devices."""
    mesh, names = eqn.params["mesh"], tuple(eqn.params["newly_manual_axes"])
    ins, split = list(ins), []
    for i, spec in enumerate(eqn.params["in_specs"]):
        parts = _split(ins[i], spec, mesh)
        if isinstance(parts, str):
            ins[i], parts = it.dense(eqn, [ins[i]], parts)[0], (spec, None)
        split.append(parts)
    specs, local = zip(*split, strict=True)
    sharded = {v.path: dict(v.sharded) for v in local if v is not None}
    function = it.scope(compat.inner_jaxpr(eqn), it.depends_of(eqn))

    def body(*shards):
        # the leaves of an argument are local already; what is static about it becomes local here
        args = [a if v is None else _with_payload(v, a) for a, v in zip(shards, local, strict=True)]
        outs, moments = function(args)
        outs = it.dense(eqn, outs, "the weight leaves its body as a result")
        readers = _readers(function.recorder)
        tracked = eqn.params["check_vma"]
        return outs, [_merged(m, readers[i], sharded, names, tracked) for i, m in enumerate(moments)]

    outs, moments = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=specs,
        out_specs=(list(eqn.params["out_specs"]), PartitionSpec()),
        check_vma=eqn.params["check_vma"],
        axis_names=set(names),
    )(*ins)
    shards = {path: {a: mesh.shape[name] for a, name in axes.items()} for path, axes in sharded.items()}
    recorder = function.recorder
    recorder.uses = {use.widened(shards.get(use.path, {})): sites for use, sites in recorder.uses.items()}
    it.recorder.absorb(recorder, moments)
    return list(outs)


def _with_payload(local: View, arg: View) -> View:
    if not isinstance(arg.payload, QTensor):
        return dataclasses.replace(local, payload=arg.payload, index=arg.index)
    payload = dataclasses.replace(arg.payload, in_shape=local.payload.in_shape)
    name = dict(local.sharded).get(payload.contract[0] + len(local.sizes))
    if payload.outlier_index is not None and name is not None:  # of all channels; here those of this device are
        size = math.prod(payload.in_shape)
        index = payload.outlier_index - size * lax.axis_index(name)
        here = jnp.where((index >= 0) & (index < size), index, size)
        payload = dataclasses.replace(payload, outlier_index=here)
    return dataclasses.replace(local, payload=payload, index=arg.index)


def _split(v, spec, mesh) -> tuple | str:
    """In-spec of an input, and for a view its static, local form; a string says why it cannot be split so."""
    if not isinstance(v, View):
        return spec, None
    names = tuple(spec) + (None,) * (len(v.axes) - len(spec))
    if any(isinstance(n, tuple) and len(n) > 1 for n in names):
        return "one axis of the weight is split over several mesh axes"
    names = tuple(n[0] if isinstance(n, tuple) else n for n in names)
    whole = {d: v.whole(d) for d, n in enumerate(names) if n is not None}
    of_axis = {axis: names[d] for d, axis in whole.items() if axis is not None}
    if len(of_axis) < len(whole):
        return "the split axis is not one whole axis of the weight"
    sizes = tuple(n // mesh.shape[of_axis[a]] if a in of_axis else n for a, n in enumerate(v.sizes))
    axes = tuple(tuple(Factor(f.axis, f.stride, sizes[f.axis]) for f in a) if v.whole(d) in of_axis else a
                 for d, a in enumerate(v.axes))  # fmt: skip
    local = dataclasses.replace(v, axes=axes, sizes=sizes, sharded=(*v.sharded, *of_axis.items()))
    index = tuple(PartitionSpec() for _ in v.index)
    if not isinstance(v.payload, QTensor):
        return dataclasses.replace(v, payload=PartitionSpec(*names), index=index), local
    return _split_qtensor(v, local, of_axis, mesh, index)


def _split_qtensor(v, local, of_axis, mesh, index) -> tuple | str:
    q, ndim = v.payload, len(v.sizes)
    contract = [a + ndim for a in q.contract]
    cut = [a for a in contract if a in of_axis]
    if cut and cut != contract[:1]:
        return "a contracting axis of the weight is split that is not its first"
    if cut and q.input_order is not None:
        return "its input channels are split, and its codes are in another order than they are"
    shards = mesh.shape[of_axis[cut[0]]] if cut else 1
    if not _whole_per_shard(q, shards):
        return f"its {math.prod(q.in_shape)} input channels do not split into {shards} shards of whole groups"
    place = {payload_axis(v, a): name for a, name in of_axis.items() if a not in contract}

    def names(shape):
        along = [place.get(i) if n > 1 else None for i, n in enumerate(shape)]
        k = len(shape) - 1 - len(q.out)
        along[k] = of_axis[cut[0]] if cut and shape[k] > 1 else None
        return along[:k], along[k], along[k + 1 :]

    def spec(a):
        lead, k, out = names(a.shape)
        return PartitionSpec(*lead, k, *out)

    specs = jax.tree.map(spec, q)
    for field in ("adapter_out", "outlier_index", "outlier_weight"):  # their rows are no channels: all go everywhere
        a = getattr(q, field)
        if a is not None:
            lead, _, out = names(a.shape)
            specs = dataclasses.replace(specs, **{field: PartitionSpec(*lead, None, *out)})
    if q.contract_last:
        at, sizes = q.values.ndim - 1 - len(q.out), q.values.shape
        lead, k, out = names((*sizes[:at], sizes[-1], *sizes[at:-1]))
        specs = dataclasses.replace(specs, values=PartitionSpec(*lead, *out, k))
    in_shape = tuple(local.sizes[a] for a in contract)
    local = dataclasses.replace(local, payload=dataclasses.replace(q, in_shape=in_shape))
    return dataclasses.replace(v, payload=specs, index=index), local


def _whole_per_shard(q, shards) -> bool:
    size = math.prod(q.in_shape)
    groups = q.spec.num_groups(size)
    plain = BLOCK if is_packed(q.spec) else 1
    run = plain if q.prepared is None else q.prepared.run(q.spec.bits)
    return shards == 1 or (size % (shards * run) == 0 and (groups == 1 or groups % shards == 0))


def _readers(recorder: Recorder) -> dict[int, list[Use]]:
    """The uses of each site."""
    readers: dict[int, list[Use]] = {}
    for use, sites in recorder.uses.items():
        for site in sites:
            readers.setdefault(site, []).append(use)
    return readers


def _merged(m: Moments, uses: list[Use], sharded, names, tracked: bool) -> Moments:
    """One site's moments, the same on every device: experts' shards are put together, tokens' are merged.

    Over a mesh axis that splits inputs or outputs of a weight, every device has seen the same tokens. Over another one,
    it depends on the tokens, which is known if JAX keeps track of what varies.
    """
    of_weights = {name for use in uses for name in sharded.get(use.path, {}).values()}
    place = {sharded.get(use.path, {}).get(f.axis): i for use in uses for i, f in enumerate(use.stacked)}
    for name in names:
        if name in place:
            m = jax.tree.map(lambda a, i=place[name], name=name: _gathered(a, name, i), m)
        elif name in of_weights:
            m = _first(m, name)
        elif not tracked or name in compat.varying(m.gram):
            m = _merged_over(m, name)
    return m


def _first(m: Moments, name: str) -> Moments:
    """The moments of the first device, on all of them."""
    return jax.tree.map(lambda a: lax.psum(jnp.where(lax.axis_index(name) == 0, a, jnp.zeros_like(a)), name), m)


def _merged_over(m: Moments, name: str) -> Moments:
    sums = {f: lax.psum(getattr(m, f), name) for f in ("gram", "abs_sum", "count", "dropped")}
    rows, rank = _gathered(m.rows, name, m.rows.ndim - 2), _gathered(m.rank, name, m.rank.ndim - 1)
    rows, rank = statistics.smallest(rows, rank)
    lowest, highest = lax.pmin(m.lowest, name), lax.pmax(m.highest, name)
    return Moments(**sums, lowest=lowest, highest=highest, rows=rows, rank=rank)


def _gathered(a, name, axis):
    """`all_gather` whose result is known to be the same on every device: scattered into zeros, then summed."""
    n, i = lax.axis_size(name), lax.axis_index(name)
    whole = jnp.zeros((*a.shape[:axis], n * a.shape[axis], *a.shape[axis + 1 :]), a.dtype)
    return lax.psum(lax.dynamic_update_slice_in_dim(whole, a, i * a.shape[axis], axis), name)
