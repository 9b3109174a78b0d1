"""Rules for call-like primitives: how weights enter an inner jaxpr and its statistics come back out."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics import statistics
from jaxquant.numerics.qtensor import QTensor
from jaxquant.transforms.tracing import compat
from jaxquant.transforms.tracing.payloads import payload_axis, payload_leads
from jaxquant.transforms.tracing.shards import call_shard_map
from jaxquant.transforms.tracing.views import Lead, View


def _merge(it, function, result) -> list:
    outs, moments = result
    it.recorder.absorb(function.recorder, moments)
    return list(outs)


def call_jit(it, eqn, ins: list) -> list:
    """A jitted function inside the model."""
    function = it.scope(compat.inner_jaxpr(eqn))
    return _merge(it, function, jax.jit(function)(ins))


def call_remat(it, eqn, ins: list) -> list:
    """`jax.checkpoint`, with its policy kept."""
    function = it.scope(compat.inner_jaxpr(eqn))
    kept = {"policy": eqn.params["policy"], "prevent_cse": eqn.params["prevent_cse"]}
    return _merge(it, function, jax.checkpoint(function, **kept)(ins))


def call_inline(it, eqn, ins: list) -> list:
    """A function with a custom derivative, when a weight enters it: its primal; the derivative is then JAX's own."""
    function = it.scope(compat.inner_jaxpr(eqn))
    return _merge(it, function, function(ins))


def _empty(shapes: list) -> list:
    return [statistics.empty_like(m) for m in shapes]


def _merged(a: list, b: list) -> list:
    return [statistics.merge(x, y) for x, y in zip(a, b, strict=True)]


def call_scan(it, eqn, ins: list) -> list:
    """A scan: a view among the sliced inputs becomes, in the body, a view of one layer, and its statistics stack."""
    consts, carried = compat.scan_groups(eqn)
    const, carry, xs = ins[:consts], ins[consts : consts + carried], ins[consts + carried :]
    if any(isinstance(c, View) for c in carry):
        return it.other(eqn, ins, "the weight is carried from iteration to iteration; pass it in as a constant")
    if not all(_sliceable(x) for x in xs if isinstance(x, View)):
        return it.other(eqn, ins, "it slices an axis of the weight that is not a whole, leading one")
    token = next(it.tokens)
    function = it.scope(compat.inner_jaxpr(eqn), token)
    fronted = [_to_front(x) for x in xs]
    positions = [x.index if isinstance(x, View) else () for x in xs]
    plain = [dataclasses.replace(x, index=()) if isinstance(x, View) else x for x in fronted]

    def body(state, step):
        i, xs = step
        layer = [_one_layer(x, at, token) for x, at in zip(xs, positions, strict=True)]
        outs, moments = function([*const, *state, *layer], i)
        stacks = [token in scans for scans in function.recorder.scans]
        summed = [m for m, s in zip(moments, stacks, strict=True) if not s]
        return outs[:carried], outs[carried:], summed, [m for m, s in zip(moments, stacks, strict=True) if s]

    steps = (jnp.arange(eqn.params["length"]), plain)
    first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), steps)
    run, (_, _, shapes, _) = compat.stage(body, carry, first)

    def step(state, x):
        outs, ys, summed, stacked = run(state[0], x)
        return (outs, _merged(state[1], summed)), (ys, stacked)

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    (outs, summed), (ys, stacked) = lax.scan(step, (carry, _empty(shapes)), steps, **options)
    pick = {False: iter(summed), True: iter(stacked)}
    moments = [next(pick[token in scans]) for scans in function.recorder.scans]
    return _merge(it, function, ([*outs, *ys], moments))


def _sliceable(x: View) -> bool:
    axis = x.whole(0)
    if axis is None:
        return False
    return axis in payload_leads(x) if isinstance(x.payload, QTensor) else axis not in x.cut


def _to_front(x):
    """Moves the axis that a scan slices to the front of a QTensor's arrays (a dense payload has it there)."""
    if not isinstance(x, View) or not isinstance(x.payload, QTensor):
        return x
    at = payload_axis(x, x.whole(0))
    return dataclasses.replace(x, payload=jax.tree.map(lambda a: jnp.moveaxis(a, at, 0), x.payload))


def _one_layer(x, positions, token):
    if not isinstance(x, View):
        return x
    lead = Lead(x.axes[0][0].axis, "scan", token)
    return dataclasses.replace(x, axes=x.axes[1:], leads=(*x.leads, lead), index=positions)


def call_while(it, eqn, ins: list) -> list:
    """A while loop: statistics are summed in the carry."""
    a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_const, body_const, init = ins[:a], ins[a : a + b], ins[a + b :]
    if any(isinstance(v, View) for v in [*cond_const, *init]):
        return it.other(eqn, ins, "the weight is in the loop's condition or carried; pass it to the body as a constant")
    token = next(it.tokens)
    function = it.scope(compat.close(eqn.params["body_jaxpr"]), token)
    run, (_, shapes) = compat.stage(lambda c, i: function([*body_const, *c], i), init, jnp.int32(0))
    condition = compat.stage(lambda c: _run_plain(it, eqn.params["cond_jaxpr"], [*cond_const, *c])[0], init)[0]

    def body(state):
        carry, moments, i = state
        outs, new = run(carry, i)
        return outs, _merged(moments, new), i + 1

    outs, moments, _ = lax.while_loop(lambda s: condition(s[0]), body, (init, _empty(shapes), jnp.int32(0)))
    return _merge(it, function, (outs, moments))


def _run_plain(it, jaxpr, args):
    return it.scope(compat.close(jaxpr))(args)[0]


def call_cond(it, eqn, ins: list) -> list:
    """A conditional: a branch that is not taken adds statistics of no rows."""
    index, args = ins[0], ins[1:]
    functions = [it.scope(compat.close(branch)) for branch in eqn.params["branches"]]
    staged = [compat.stage(function, args) for function in functions]
    shapes = [moments for _, (_, moments) in staged]

    def branch(i, *args):
        outs, moments = staged[i][0](list(args))
        return outs, [moments if j == i else _empty(s) for j, s in enumerate(shapes)]

    branches = [partial(branch, i) for i in range(len(staged))]
    outs, moments = lax.switch(index.astype(jnp.int32), branches, *args)
    for function, m in zip(functions, moments, strict=True):
        it.recorder.absorb(function.recorder, m)
    return list(outs)


CALLS = {
    **dict.fromkeys(compat.JIT, call_jit),
    **dict.fromkeys(compat.REMAT, call_remat),
    **dict.fromkeys(compat.CUSTOM, call_inline),
    "scan": call_scan,
    "while": call_while,
    "cond": call_cond,
    "shard_map": call_shard_map,
}
