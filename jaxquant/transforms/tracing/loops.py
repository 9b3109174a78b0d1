"""Rules for call-like primitives: how weights enter an inner jaxpr and its statistics come back out.

A weight that an inner jaxpr returns unchanged is the same weight outside of it (`forwarding`). Elsewhere JAX's control
flow would have to carry a view out of a body, and it is made dense.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics import statistics
from jaxquant.numerics.qtensor import QTensor
from jaxquant.transforms.tracing import compat, payloads
from jaxquant.transforms.tracing.forwarding import forwarded_by
from jaxquant.transforms.tracing.recorder import Recorder
from jaxquant.transforms.tracing.shards import call_shard_map
from jaxquant.transforms.tracing.views import Lead, Take, View

ESCAPES = "the weight leaves its body as a result"


def _merge(it, function, result) -> list:
    outs, moments = result
    it.recorder.absorb(function.recorder, moments)
    return list(outs)


def call_jit(it, eqn, ins: list) -> list:
    """A jitted function."""
    return it.inline(eqn, compat.inner_jaxpr(eqn), ins)


def call_custom(it, eqn, ins: list) -> list:
    """A function with a derivative of its own: the function. A derivative that takes the dense weight has none."""
    outs = it.inline(eqn, compat.inner_jaxpr(eqn), ins)
    paths = [v.path for v in ins if isinstance(v, View) and isinstance(v.payload, QTensor)]
    return [o if isinstance(o, View) or not paths else _not_differentiable(o, paths) for o in outs]


def _not_differentiable(x, paths: list[str]):
    @jax.custom_jvp
    def same(x):
        return x

    @same.defjvp
    def refuse(primals, tangents):
        raise TypeError(
            f"a function with a custom derivative takes the quantized weight '{paths[0]}'; its derivative would need "
            "the dense weight. Leave the weight out of the recipe, or take no derivative through this function"
        )

    return same(x)


def call_remat(it, eqn, ins: list) -> list:
    """`jax.checkpoint`, with its policy kept."""
    function = it.scope(compat.inner_jaxpr(eqn), it.depends_of(eqn))
    kept = {"policy": eqn.params["policy"], "prevent_cse": eqn.params["prevent_cse"]}
    return _merge(it, function, jax.checkpoint(function, **kept)(ins))


def _through(eqn, ins: list) -> list:
    """For each result of an equation, the view among its inputs that it is; None if it is none."""
    sources = forwarded_by(eqn)
    return [ins[i] if i is not None and isinstance(ins[i], View) else None for i in sources]


def _without(values: list, views: list) -> list:
    """The values, without those that are views anyway."""
    return [None if view is not None else v for v, view in zip(values, views, strict=True)]


def _with(values: list, views: list) -> list:
    """The values, with the views in their places."""
    return [v if view is None else view for v, view in zip(values, views, strict=True)]


def _empty(avals: list) -> list:
    return [jax.tree.map(compat.varying_as, statistics.empty_like(m), m) for m in avals]


def _merged(a: list, b: list) -> list:
    return [statistics.merge(x, y) for x, y in zip(a, b, strict=True)]


def _stack(it, site: int, length: int, layer):
    """Moments of all layers to merge a scan's into: those of earlier batches, if this scope has them."""
    total = it.recorder.include(site)
    if total is not None:
        return total
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((length, *a.shape), a.dtype), layer)
    return jax.tree.map(compat.varying_as, statistics.empty_like(shapes), layer)


def _merged_at(stack, layer, i):
    """The stack, with one layer's moments merged into its own. In a carry that needs no second stack in memory."""
    both = statistics.merge(jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), stack), layer)
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, i, 0), stack, both)


def call_scan(it, eqn, ins: list) -> list:
    """A scan: a view among the sliced inputs becomes, in the body, a view of one layer, and its statistics stack."""
    if eqn.params["length"] == 0:
        return it.other(eqn, ins, "it has no iterations")
    consts, carried = compat.scan_groups(eqn)
    through = _through(eqn, ins)
    const, xs = ins[:consts], ins[consts + carried :]
    carry = _without(ins[consts : consts + carried], through[:carried])
    carry = it.dense(eqn, carry, "the weight is carried from iteration to iteration; pass it in as a constant")
    uncut = "it slices an axis of the weight that is not a single one, or that groups and packed codes run over"
    xs = [x if _sliceable(x) else it.dense(eqn, [x], uncut)[0] for x in xs]
    token, depends = next(it.tokens), it.depends_of(eqn)
    depends[consts:] = [it.base.union({token}, *depends)] * len(depends[consts:])
    function = it.scope(compat.inner_jaxpr(eqn), depends, loop=token)
    arrays = [None if _indexed(x) else dataclasses.replace(x, index=()) if isinstance(x, View) else x for x in xs]

    def body(state, step):
        i, sliced = step
        layer = [_one_layer(x, a, i, token) for x, a in zip(xs, sliced, strict=True)]
        outs, moments = function([*const, *_with(state, through[:carried]), *layer], i)
        outs = it.dense(eqn, _without(outs, through), ESCAPES)
        stacks = [token in scans for scans in function.recorder.scans]
        summed = [m for m, s in zip(moments, stacks, strict=True) if not s]
        return outs[:carried], outs[carried:], summed, [m for m, s in zip(moments, stacks, strict=True) if s]

    steps = (jnp.arange(eqn.params["length"]), arrays)
    first = jax.tree.map(lambda a: lax.index_in_dim(a, 0, keepdims=False), steps)  # only its type is used
    run, (_, _, shapes, layers) = compat.stage(body, carry, first)

    def step(state, x):
        outs, ys, summed, layer = run(state[0], x)
        stacked = [_merged_at(stack, m, x[0]) for stack, m in zip(state[2], layer, strict=True)]
        return (outs, _merged(state[1], summed), stacked), ys

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    sites = [j for j, scans in enumerate(function.recorder.scans) if token in scans]
    stacks = [_stack(it, j, options["length"], layer) for j, layer in zip(sites, layers, strict=True)]
    (outs, summed, stacked), ys = lax.scan(step, (carry, _empty(shapes), stacks), steps, **options)
    pick = {False: iter(summed), True: iter(stacked)}
    moments = [next(pick[token in scans]) for scans in function.recorder.scans]
    return _merge(it, function, (_with([*outs, *ys], through), moments))


def _sliceable(x) -> bool:
    if not isinstance(x, View):
        return True
    f = x.factor(0)
    return f is not None and (not isinstance(x.payload, QTensor) or payloads.payload_axis(x, f.axis) is not None)


def _indexed(x) -> bool:
    """Whether the body takes its layer of a view itself: JAX would slice the wrong axis of a QTensor's arrays.

    Not where the first axis of all of them is the one that is sliced: the derivative of what is sliced by JAX is put
    together layer by layer, and that of what a body takes for itself is added up, whole, in every iteration.
    """
    if not isinstance(x, View) or not isinstance(x.payload, QTensor):
        return False
    whole = x.whole(0)
    return whole is None or payloads.payload_axis(x, whole) != 0


def _one_layer(x, sliced, i, token: int):
    if not isinstance(x, View):
        return sliced
    f = x.axes[0][0]
    view: Any = payloads.take(x, Take(f, i, None)) if _indexed(x) else sliced  # `_sliceable` said that it can be taken
    return dataclasses.replace(view, axes=x.axes[1:], leads=(*x.leads, Lead(f, "scan", None, token)), index=x.index)


def call_while(it, eqn, ins: list) -> list:
    """A while loop: statistics are summed in the carry."""
    a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    through, token = _through(eqn, ins), next(it.tokens)
    init = it.dense(eqn, _without(ins[a + b :], through), "the weight is carried; pass it to the body as a constant")
    cond_const = it.dense(eqn, ins[:a], "the weight decides when the loop ends")
    depends = it.depends_of(eqn)
    base = it.base.union(*depends)  # they decide how often the body runs
    carried = [base | {token}] * len(init)
    function = it.scope(compat.close(eqn.params["body_jaxpr"]), [*depends[a : a + b], *carried], loop=token, base=base)
    nothing = Recorder(keeps=False)
    condition = it.scope(compat.close(eqn.params["cond_jaxpr"]), [*depends[:a], *carried], recorder=nothing)

    def once(carry, i):
        outs, moments = function([*ins[a : a + b], *_with(carry, through)], i)
        return it.dense(eqn, _without(outs, through), ESCAPES), moments

    run, (_, shapes) = compat.stage(once, init, jnp.int32(0))

    def body(state):
        carry, moments, i = state
        outs, new = run(carry, i)
        return outs, _merged(moments, new), i + 1

    def test(state):
        outs, _ = condition([*cond_const, *_with(state[0], through)])
        return outs[0]

    outs, moments, _ = lax.while_loop(test, body, (init, _empty(shapes), jnp.int32(0)))
    return _merge(it, function, (_with(outs, through), moments))


def call_cond(it, eqn, ins: list) -> list:
    """A conditional: a branch that is not taken adds statistics of no rows."""
    through = _through(eqn, ins)
    index, args = it.dense(eqn, ins[:1], "the weight decides which branch is taken")[0], ins[1:]
    chosen_by, *depends = it.depends_of(eqn)
    functions = [it.scope(compat.close(branch), depends, base=chosen_by) for branch in eqn.params["branches"]]

    def one(function, args):
        outs, moments = function(args)
        return it.dense(eqn, _without(outs, through), ESCAPES), moments

    staged = [compat.stage(partial(one, function), args) for function in functions]
    shapes = [moments for _, (_, moments) in staged]

    def branch(i, *args):
        outs, moments = staged[i][0](list(args))
        return outs, [moments if j == i else _empty(s) for j, s in enumerate(shapes)]

    branches = [partial(branch, i) for i in range(len(staged))]
    outs, moments = lax.switch(jnp.int32(index), branches, *args)
    for function, m in zip(functions, moments, strict=True):
        it.recorder.absorb(function.recorder, m)
    return _with(outs, through)


CALLS = {
    **dict.fromkeys(compat.JIT, call_jit),
    **dict.fromkeys(compat.CUSTOM, call_custom),
    **dict.fromkeys(compat.REMAT, call_remat),
    "scan": call_scan,
    "while": call_while,
    "cond": call_cond,
    "shard_map": call_shard_map,
}
