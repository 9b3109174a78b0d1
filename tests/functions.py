"""A table of model functions in every style, and for each what its weights are multiplied with, in plain code.

A case runs a model twice: `apply` is the model as people write it, and `reference` the same arithmetic one operation
after another, in Python loops, which tells `see` the input of every product. The two must agree, so a mistake in the
reference shows.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

D, F, H, L, E, V = 16, 32, 4, 3, 4, 24  # width, inner width, heads, layers, experts, vocabulary
B, T = 4, 8  # sequences and tokens of a batch
HEAD = D // H


def normal(*shape, seed=0, dtype="float32"):
    """Weights of about unit gain."""
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape) * 0.3, dtype)


def floats(batches=2, shape=(B, T, D)):
    return [normal(*shape, seed=100 + i) * 3 for i in range(batches)]


def tokens(batches=2, shape=(B, T)):
    rng = np.random.default_rng(5)
    return [jnp.asarray(rng.integers(0, V, shape), jnp.int32) for _ in range(batches)]


class Seen:
    """Collects `{path: {position along the leading axes: [(rows [T, K], offsets in the batch [T])]}}`."""

    def __init__(self):
        self.inputs: dict[str, dict[tuple, list]] = {}

    def __call__(self, path, x, lead=(), at=None):
        """Notes an input `[..., K]`; `at` are its rows' positions in the batch, by default 0, 1, 2, …"""
        rows = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
        at = np.arange(len(rows)) if at is None else np.asarray(at).reshape(-1)
        lead = (lead,) if isinstance(lead, int) else lead
        self.inputs.setdefault(path, {}).setdefault(lead, []).append((rows, at))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model function.

    Attributes:
      apply: `apply(params, x)`.
      params, batches: its parameters and inputs, made anew by each call.
      reference: `reference(params, x, see)` gives the same result.
      axes: contracting and output axes per path; by default those of `[..., in, out]`.
      shared: groups of paths whose statistics are one object.
      lookups: paths that are looked up.
      noted: paths that `calibrate` mentions in its notes.
      group: group size that divides the inputs of every weight.
    """

    name: str
    apply: Callable
    params: Callable[[], Any]
    reference: Callable
    batches: Callable[[], list] = floats
    axes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    lookups: frozenset = frozenset()
    noted: frozenset = frozenset()
    group: int = 8


CASES: dict[str, Case] = {}


def case(params, reference, **fields):
    """Registers the decorated function as a case of its name."""

    def register(apply):
        name = fields.pop("name", apply.__name__)
        CASES[name] = Case(name, apply, params, reference, **fields)
        return apply

    return register


def act(x):
    return jnp.tanh(x)


def norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


# ------------------------------------------------------------------------------------------------- layers, one by one


def stack_of(layers=L):
    return {
        "up": normal(layers, D, F),
        "gate": normal(layers, D, F, seed=1),
        "down": normal(layers, F, D),
        "bias": normal(layers, F, seed=3),
        "scale": 1 + normal(layers, D, seed=4),
    }


def list_of():
    layers = [jax.tree.map(lambda a, i=i: a[i], stack_of()) for i in range(L)]
    return {"layers": layers, "head": normal(D, V)}


def block(w, x):
    h = norm(x, w["scale"])
    return x + (act(h @ w["gate"]) * (h @ w["up"] + w["bias"])) @ w["down"]


def block_reference(w, x, see, path, lead=(), at=None):
    h = norm(x, w["scale"])
    see(path + "gate", h, lead, at)
    see(path + "up", h, lead, at)
    m = act(h @ w["gate"]) * (h @ w["up"] + w["bias"])
    see(path + "down", m, lead, at)
    return x + m @ w["down"]


def layer(w, *index):
    return jax.tree.map(lambda a: a[index], w)


def list_reference(params, x, see):
    for i, w in enumerate(params["layers"]):
        x = block_reference(w, x, see, f"layers/{i}/")
    see("head", x)
    return x @ params["head"]


def stack_reference(params, x, see, order=None, path=""):
    for i in range(len(params["up"])) if order is None else order:
        x = block_reference(layer(params, i), x, see, path, i)
    return x


LIST_SHARED = tuple((f"layers/{i}/gate", f"layers/{i}/up") for i in range(L))


@case(list_of, list_reference, shared=LIST_SHARED)
def list_of_layers(params, x):
    for w in params["layers"]:
        x = block(w, x)
    return x @ params["head"]


@case(list_of, list_reference, shared=LIST_SHARED)
def jitted_pieces(params, x):
    """Every product stands in a jitted function of its own."""
    dot = jax.jit(lambda x, w: jnp.einsum("btd,df->btf", x, w))

    @jax.jit
    def step(w, x):
        h = norm(x, w["scale"])
        return x + dot(act(dot(h, w["gate"])) * (dot(h, w["up"]) + w["bias"]), w["down"])

    for w in params["layers"]:
        x = step(w, x)
    return dot(x, params["head"])


STACK_NOTED = frozenset({"bias", "scale"})  # two axes, so they are followed, and no product
STACKED = {"shared": (("gate", "up"),), "noted": STACK_NOTED}


@case(stack_of, stack_reference, **STACKED)
def scan(params, x):
    return lax.scan(lambda x, w: (block(w, x), None), x, params)[0]


@case(stack_of, partial(stack_reference, order=reversed(range(L))), **STACKED, name="scan_reverse")
def _(params, x):
    return lax.scan(lambda x, w: (block(w, x), None), x, params, reverse=True, unroll=2)[0]


CASES["scan_reverse"] = dataclasses.replace(
    CASES["scan_reverse"], reference=lambda p, x, see: stack_reference(p, x, see, order=range(L)[::-1])
)


@case(lambda: stack_of(1), stack_reference, **STACKED)
def scan_one_layer(params, x):
    return lax.scan(lambda x, w: (block(w, x), None), x, params)[0]


@case(lambda: stack_of(1), stack_reference, **STACKED)
def index_one_layer(params, x):
    return block(layer(params, 0), x)


@case(stack_of, stack_reference, **STACKED)
def stack_indexed(params, x):
    for i in range(L):
        x = block(layer(params, i - L), x)
    return x


@case(stack_of, stack_reference, **STACKED)
def stack_unstacked(params, x):
    for w in zip(*(jnp.unstack(params[k]) for k in sorted(params)), strict=True):
        x = block(dict(zip(sorted(params), w, strict=True)), x)
    return x


@case(stack_of, stack_reference, **STACKED)
def first_layer_apart(params, x):
    """The first layer by index, and the others in a scan over a part of the stack."""
    x = block(layer(params, 0), x)
    return lax.scan(lambda x, w: (block(w, x), None), x, jax.tree.map(lambda a: a[1:], params))[0]


def nested_reference(params, x, see):
    for i in range(2):
        for j in range(3):
            x = block_reference(layer(params, i, j), x, see, "", (i, j))
    return x


NESTED_AXES = {k: ((2,), (3,)) for k in ("gate", "up", "down")}


@case(
    lambda: jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), stack_of(6)),
    nested_reference,
    axes=NESTED_AXES,
    **STACKED,
)
def nested_scan(params, x):
    inner = lambda x, w: (block(w, x), None)  # noqa: E731
    return lax.scan(lambda x, w: lax.scan(inner, x, w), x, params)[0]


@case(lambda: stack_of(6), stack_reference, **STACKED)
def scan_of_blocks(params, x):
    """The stack is cut into blocks of layers, as people do to checkpoint every few layers."""
    blocks = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), params)
    inner = lambda x, w: (block(w, x), None)  # noqa: E731
    return lax.scan(jax.checkpoint(lambda x, w: lax.scan(inner, x, w)), x, blocks)[0]


def middle_stack():
    return {k: jnp.moveaxis(a, 0, 1) if k in ("gate", "up", "down") else a for k, a in stack_of().items()}


def middle_reference(params, x, see):
    return stack_reference({k: jnp.moveaxis(a, 1, 0) if k in NESTED_AXES else a for k, a in params.items()}, x, see)


@case(middle_stack, middle_reference, axes={k: ((0,), (2,)) for k in NESTED_AXES}, **STACKED)
def layer_axis_in_the_middle(params, x):
    """MaxText keeps `[in, layers, out]` and moves the axis to the front before it scans."""
    fronted = {k: jnp.moveaxis(a, 1, 0) if k in ("gate", "up", "down") else a for k, a in params.items()}
    return lax.scan(lambda x, w: (block(w, x), None), x, fronted)[0]


def rnn_params():
    return {"x": normal(D, D), "h": normal(D, D, seed=1), "out": normal(D, D, seed=2)}


def rnn_reference(params, x, see):
    h, outs = jnp.zeros((B, D)), []
    for t in range(T):
        at = t * B + np.arange(B)  # iterations of a loop over time count on
        see("x", x[:, t], at=at)
        see("h", h, at=at)
        h = act(x[:, t] @ params["x"] + h @ params["h"])
        outs.append(h)
    h = jnp.stack(outs, 1)
    see("out", h)
    return h @ params["out"]


@case(rnn_params, rnn_reference)
def scan_over_time(params, x):
    step = lambda h, x: 2 * (act(x @ params["x"] + h @ params["h"]),)  # noqa: E731
    _, h = lax.scan(step, jnp.zeros((B, D)), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(h, 0, 1) @ params["out"]


def recurrent_layers_reference(params, x, see):
    for i in range(L):
        h, outs = jnp.zeros((B, D)), []
        for t in range(T):
            see("h", h, i, t * B + np.arange(B))
            h = act(x[:, t] + h @ params["h"][i])
            outs.append(h)
        x = jnp.stack(outs, 1)
    return x


@case(lambda: {"h": normal(L, D, D)}, recurrent_layers_reference)
def scan_over_time_in_scan_over_layers(params, x):
    def one(x, w):
        step = lambda h, x: 2 * (act(x + h @ w),)  # noqa: E731
        return lax.scan(step, jnp.zeros((B, D)), x)[1], None

    return jnp.swapaxes(lax.scan(one, jnp.swapaxes(x, 0, 1), params["h"])[0], 0, 1)


@case(
    lambda: {"h": normal(D, D), "init": normal(B, D)},
    lambda p, x, see: rnn_from(p["init"], p, x, see),
    noted=frozenset({"init"}),
)
def learned_first_state(params, x):
    """A parameter of two axes is carried by the loop; that must not hide the weight in the loop."""
    return lax.scan(lambda h, x: 2 * (act(x + h @ params["h"]),), params["init"], jnp.swapaxes(x, 0, 1))[1]


def rnn_from(h, params, x, see):
    outs = []
    for t in range(T):
        see("h", h, at=t * B + np.arange(B))
        h = act(x[:, t] + h @ params["h"])
        outs.append(h)
    return jnp.stack(outs)


# ---------------------------------------------------------------------------------------------- control flow and calls


@case(stack_of, stack_reference, **STACKED)
def fori_loop_over_layers(params, x):
    return lax.fori_loop(0, L, lambda i, x: block(layer(params, i), x), x)


@case(stack_of, stack_reference, **STACKED)
def while_loop_over_layers(params, x):
    def body(state):
        i, x = state
        return i + 1, block(jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), params), x)

    return lax.while_loop(lambda s: s[0] < L, body, (0, x))[1]


@case(stack_of, stack_reference, shared=(("gate", "up"),), lookups=STACK_NOTED)
def take_layers(params, x):
    return lax.fori_loop(0, L, lambda i, x: block(jax.tree.map(lambda a: jnp.take(a, i, axis=0), params), x), x)


def repeated_reference(params, x, see):
    steps = 0
    while float(jnp.mean(x * x)) < 4:
        see("w", x, at=steps * B * T + np.arange(B * T))
        x, steps = x + jnp.abs(x @ params["w"]), steps + 1
    return x


@case(lambda: {"w": normal(D, D)}, repeated_reference)
def while_loop_until(params, x):
    """The number of iterations depends on the data; the weight is a constant of the loop."""
    return lax.while_loop(lambda x: jnp.mean(x * x) < 4, lambda x: x + jnp.abs(x @ params["w"]), x)


def branches_reference(params, x, see):
    if float(jnp.sum(x)) > 0:
        see("a", x)
        y = x @ params["a"]
    else:
        see("b", x)
        y = x @ params["b"]
    see("c", y)
    y = y @ params["c"]
    return jnp.where(jnp.sum(x) > 0, y, -y)


def signed_floats():
    x = floats(1)[0]
    return [x - jnp.mean(x) + 1, x - jnp.mean(x) - 1, x - jnp.mean(x) + 2]


@case(
    lambda: {"a": normal(D, D), "b": normal(D, D, seed=1), "c": normal(D, D, seed=2)},
    branches_reference,
    batches=signed_floats,
)
def cond(params, x):
    p = jnp.sum(x) > 0
    y = lax.cond(p, lambda: x @ params["a"], lambda: x @ params["b"])
    return lax.cond(p, lambda y: y, lambda y: -y, y @ params["c"])


def switch_reference(params, x, see):
    i = int(jnp.clip(jnp.argmax(x[0, 0, :3]), 0, 2))
    if i < 2:
        see("w", x, i)
        return x @ params["w"][i]
    return x


@case(lambda: {"w": normal(2, D, D)}, switch_reference, batches=lambda: floats(4))
def switch(params, x):
    w = params["w"]
    return lax.switch(jnp.argmax(x[0, 0, :3]), [lambda: x @ w[0], lambda: x @ w[1], lambda: x])


@case(stack_of, stack_reference, **STACKED)
def scan_with_cond(params, x):
    def step(x, wi):
        w, i = wi
        return lax.cond(i >= 0, lambda: block(w, x), lambda: x), None

    return lax.scan(step, x, (params, jnp.arange(L)))[0]


@case(stack_of, stack_reference, **STACKED)
def remat_in_scan_in_jit(params, x):
    step = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False)
    return jax.jit(lambda p, x: lax.scan(lambda x, w: (step(w, x), None), x, p))(params, x)[0]


@case(list_of, list_reference, shared=LIST_SHARED)
def checkpointed(params, x):
    for w in params["layers"]:
        x = jax.checkpoint(block)(w, checkpoint_name(x, "block"))
    return x @ params["head"]


@case(stack_of, stack_reference, **STACKED)
def vmap_over_inputs(params, x):
    return jax.vmap(lambda x: scan(params, x))(x)


def simple_reference(params, x, see, then=lambda y: y):
    see("w", x)
    return then(x @ params["w"])


SQUARE = lambda: {"w": normal(D, D)}  # noqa: E731
CALLS: list = []  # what callbacks were called with


@case(SQUARE, simple_reference)
def callbacks(params, x):
    y = x @ params["w"]
    jax.debug.callback(lambda a: CALLS.append(("debug", float(a))), jnp.sum(y))
    shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
    y = lax.stop_gradient(y)
    y = jax.pure_callback(lambda a: np.asarray(a), shape, y, vmap_method="sequential")
    return io_callback(lambda a: np.asarray(a), shape, y, ordered=True)


@jax.custom_vjp
def reversed_gradient(x):
    return x * 1.0


reversed_gradient.defvjp(lambda x: (x * 1.0, None), lambda _, g: (-3 * g,))


@jax.custom_jvp
def odd_derivative(x):
    return x * x


odd_derivative.defjvp(lambda p, t: (p[0] * p[0], 7 * t[0]))


@case(SQUARE, partial(simple_reference, then=lambda y: odd_derivative(reversed_gradient(y))))
def custom_derivatives_downstream(params, x):
    return odd_derivative(reversed_gradient(x @ params["w"]))


@jax.custom_vjp
def vjp_dot(x, w):
    return x @ w


vjp_dot.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, jnp.einsum("btd,bte->de", r[0], g)))


@jax.custom_jvp
def jvp_dot(x, w):
    return x @ w


jvp_dot.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))


def chain_reference(*names):
    def reference(params, x, see):
        for name in names:
            see(name, x)
            x = x @ params[name]
        return x

    return reference


@case(lambda: {"a": normal(D, D), "b": normal(D, D, seed=1)}, chain_reference("a", "b"))
def weights_in_custom_derivatives(params, x):
    return jvp_dot(vjp_dot(x, params["a"]), params["b"])


# ------------------------------------------------------------------------------------------- weights renamed on the way


def bf16_reference(params, x, see):
    x = x.astype(jnp.bfloat16)
    see("w", x)
    return (x @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32)


@case(SQUARE, bf16_reference)
def cast_to_bf16(params, x):
    w = params["w"].astype(jnp.bfloat16)
    return (x.astype(jnp.bfloat16) @ w).astype(jnp.float32)


def outin_reference(params, x, see):
    see("w", x)
    return x @ params["w"].T


OUT_IN = {"w": ((1,), (0,))}


@case(lambda: {"w": normal(F, D)}, outin_reference, axes=OUT_IN)
def stored_transposed(params, x):
    return x @ params["w"].T


@case(lambda: {"w": normal(F, D)}, outin_reference, axes=OUT_IN)
def weight_on_the_left(params, x):
    y = lax.dot_general(params["w"], x, (((1,), (2,)), ((), ())))
    return jnp.moveaxis(y, 0, -1)


def heads_reference(params, x, see):
    see("q", x)
    q = jnp.einsum("btd,dhk->bthk", x, params["q"])
    q = act(q) * jnp.arange(1.0, H + 1)[:, None]
    see("o", q.reshape(B, T, H * HEAD))
    return jnp.einsum("bthk,hkd->btd", q, params["o"])


HEADS = lambda: {"q": normal(D, H, HEAD), "o": normal(H, HEAD, F)}  # noqa: E731
HEADS_AXES = {"q": ((0,), (1, 2)), "o": ((0, 1), (2,))}


@case(HEADS, heads_reference, axes=HEADS_AXES)
def heads_by_einsum(params, x):
    q = act(jnp.einsum("btd,dhk->bthk", x, params["q"])) * jnp.arange(1.0, H + 1)[:, None]
    return jnp.einsum("bthk,hkd->btd", q, params["o"])


@case(HEADS, heads_reference, axes=HEADS_AXES)
def heads_by_reshape(params, x):
    q = (x @ params["q"].reshape(D, -1)).reshape(B, T, H, HEAD)
    q = act(q) * jnp.arange(1.0, H + 1)[:, None]
    return q.reshape(B, T, -1) @ params["o"].reshape(-1, F)


@case(HEADS, heads_reference, axes=HEADS_AXES)
def heads_in_another_order(params, x):
    """The contracting axes are paired in the reverse of the weight's order."""
    q = act(jnp.einsum("dhk,btd->btkh", params["q"], x)) * jnp.arange(1.0, H + 1)
    return jnp.einsum("btkh,hkd->btd", q, params["o"])


def qkv_reference(params, x, see):
    q, k, v = (x @ w for w in params)
    return (q * k + v) @ params[0]


def fused_index_reference(params, x, see):
    see("w", x)
    q, k, v = (x @ params["w"][:, i] for i in range(3))
    return q * k + v


FUSED_AXES = {"w": ((0,), (1, 2))}


@case(lambda: {"w": normal(D, 3, F)}, fused_index_reference, axes=FUSED_AXES)
def fused_qkv_indexed(params, x):
    q, k, v = (x @ params["w"][:, i] for i in range(3))
    return q * k + v


def fused_split_reference(params, x, see):
    see("w", x)
    q, k, v = jnp.split(x @ params["w"], 3, -1)
    return q * k + v


FUSED = lambda: {"w": normal(D, 3 * F)}  # noqa: E731


@case(FUSED, fused_split_reference)
def fused_qkv_split(params, x):
    q, k, v = (x @ w for w in jnp.split(params["w"], 3, axis=1))
    return q * k + v


@case(FUSED, fused_split_reference)
def fused_qkv_sliced(params, x):
    q, k, v = (x @ params["w"][:, i * F : (i + 1) * F] for i in range(3))
    return q * k + v


@case(FUSED, fused_split_reference)
def fused_qkv_sliced_by_traced_start(params, x):
    part = lambda i: lax.dynamic_slice_in_dim(params["w"], i * F, F, 1)  # noqa: E731
    _, (q, k, v) = lax.scan(lambda c, i: (c, lax.stop_gradient(x) @ part(i)), None, jnp.arange(3))
    return q * k + v


CASES["fused_qkv_sliced_by_traced_start"] = dataclasses.replace(
    CASES["fused_qkv_sliced_by_traced_start"],
    reference=lambda p, x, see: (
        [see("w", x, at=i * B * T + np.arange(B * T)) for i in range(3)],
        fused_split_reference(p, x, lambda *_: None),
    )[1],
)


def column_reference(params, x, see):
    see("w", x)
    return x @ params["w"] + (x @ params["w"][:, :1])


@case(lambda: {"w": normal(D, F)}, column_reference)
def one_column_and_all(params, x):
    return x @ params["w"] + x @ params["w"][:, :1]


@case(SQUARE, lambda p, x, see: simple_reference({"w": p["w"][:, :1]}, x, see))
def one_column(params, x):
    return x @ params["w"][:, :1]


# ----------------------------------------------------------------------------------------------- embeddings and experts


def tied_reference(params, ids, see):
    w = params["embedding"]
    x = act(w[ids % V])
    see("embedding", x)
    return x @ w.T


@case(
    lambda: {"embedding": normal(V, D)},
    tied_reference,
    batches=tokens,
    axes={"embedding": ((1,), (0,))},
    lookups=frozenset({"embedding"}),
)
def tied_embedding(params, ids):
    return act(params["embedding"][ids]) @ params["embedding"].T


def lookup_reference(params, ids, see):
    x = np.asarray(params["embedding"])[np.asarray(ids)]
    see("w", x)
    return x @ params["w"]


@case(
    lambda: {"embedding": normal(V, D), "w": normal(D, F)},
    lookup_reference,
    batches=tokens,
    lookups=frozenset({"embedding"}),
)
def embedding(params, ids):
    return jnp.take(params["embedding"], ids, axis=0) @ params["w"]


def expert_inputs(x):
    return jnp.stack([x * (e + 1) for e in range(E)])


def experts_reference(params, x, see):
    outs = []
    for e in range(E):
        y = x.reshape(-1, D) * (e + 1)
        see("up", y, e)
        y = act(y @ params["up"][e])
        see("down", y, e)
        outs.append(y @ params["down"][e])
    return jnp.stack(outs)


EXPERTS = lambda: {"up": normal(E, D, F), "down": normal(E, F, D)}  # noqa: E731


@case(EXPERTS, experts_reference)
def experts_batched(params, x):
    y = expert_inputs(x.reshape(-1, D))
    y = act(jnp.einsum("ecd,edf->ecf", y, params["up"]))
    return jnp.einsum("ecf,efd->ecd", y, params["down"])


@case(EXPERTS, experts_reference)
def experts_vmapped(params, x):
    expert = lambda w, y: act(y @ w["up"]) @ w["down"]  # noqa: E731
    return jax.vmap(expert)(params, expert_inputs(x.reshape(-1, D)))


@case(EXPERTS, experts_reference)
def experts_scanned(params, x):
    step = lambda _, wy: (None, act(wy[1] @ wy[0]["up"]) @ wy[0]["down"])  # noqa: E731
    return lax.scan(step, None, (params, expert_inputs(x.reshape(-1, D))))[1]


def dense_experts_reference(params, x, see):
    x = x.reshape(-1, D)
    see("w", x)
    return jnp.stack([x @ params["w"][e] for e in range(E)], 1)


@case(lambda: {"w": normal(E, D, F)}, dense_experts_reference, axes={"w": ((1,), (0, 2))})
def experts_with_one_input(params, x):
    """Every expert reads the same tokens, so the experts are outputs, and there is one Gram matrix."""
    return jnp.einsum("td,edf->tef", x.reshape(-1, D), params["w"])


def routed(params, x):
    """Tokens in the order of their experts, the last few of none, and the number of each expert's."""
    x = x.reshape(-1, D)
    expert = jnp.argmax(x[:, : E - 1], -1)  # the last expert sees no token
    order = jnp.argsort(expert)
    return x[order], jnp.bincount(expert, length=E).at[E - 2].add(-2)


def ragged_reference(params, x, see):
    x, groups = routed(params, x)
    outs, start = [], 0
    for e, n in enumerate(np.asarray(groups)):
        rows, at = x[start : start + n], np.arange(start, start + n)
        see("up", rows, e, at)
        y = act(rows @ params["up"][e])
        see("down", y, e, at)
        outs.append(y @ params["down"][e])
        start += n
    return jnp.pad(jnp.concatenate(outs), [(0, len(x) - start), (0, 0)])


@case(EXPERTS, ragged_reference)
def experts_ragged(params, x):
    x, groups = routed(params, x)
    return lax.ragged_dot(act(lax.ragged_dot(x, params["up"], groups)), params["down"], groups)


# --------------------------------------------------------------------------------------------------------------- shapes


def thin_reference(params, x, see):
    see("narrow", x)
    y = x @ params["narrow"]
    see("wide", y)
    y = act(y @ params["wide"][0])
    see("heads", y)
    y = y @ params["heads"][:, 0]
    see("expert", y, 0)
    y = (y @ params["expert"][0])[..., None]
    see("last", y[..., 0])
    return y[..., 0] @ params["last"][:, 0]


@case(
    lambda: {
        "narrow": normal(D, 1),
        "wide": normal(1, 1, D),
        "heads": normal(D, 1, D),
        "expert": normal(1, D, D, seed=1),
        "last": normal(D, 1, seed=2),
    },
    thin_reference,
    axes={"wide": ((0,), (1, 2)), "heads": ((0,), (1, 2))},
    group=1,
)
def axes_of_size_one(params, x):
    y = x.reshape(-1, D) @ params["narrow"]
    y = act(y @ params["wide"].reshape(1, D))
    y = y @ params["heads"].reshape(D, D)
    y = jnp.einsum("ecd,edf->ecf", y[None], params["expert"])[0]
    return (y @ params["last"].reshape(D)).reshape(B, T)


def used_again_reference(params, x, see):
    see("w", x)
    y = act(x @ params["w"])
    see("w", y)
    z = y @ params["w"] + x @ params["w"]
    see("v", y)
    return z + y @ params["v"]


@case(lambda: {"w": normal(D, D), "v": normal(D, D, seed=1)}, used_again_reference)
def used_again(params, x):
    """One weight reads two inputs, one of them twice."""
    dot = jax.jit(lambda x: x @ params["w"])
    y = act(dot(x))
    return dot(y) + dot(x) + y @ params["v"]


def odd_leaves():
    return {
        "w": normal(D, D),
        "unused": normal(D, D, seed=1),
        "steps": jnp.arange(6).reshape(2, 3),
        "flag": jnp.asarray([[True]]),
        "none": None,
        "key": jax.random.split(jax.random.key(0), (2, 2)),
        "scalar": jnp.float32(2.0),
        "number": 3.0,
        "empty": jnp.zeros((0, D)),
        "numpy": np.ones((D, D), np.float32),
    }


def odd_leaves_reference(params, x, see):
    see("w", x)
    see("numpy", x)
    y = x @ params["w"] * params["scalar"] + x @ jnp.asarray(params["numpy"]) * params["number"]
    return {"y": y + jax.random.uniform(params["key"][1, 0], ()), "n": params["steps"].sum(), "flag": params["flag"]}


@case(odd_leaves, odd_leaves_reference, shared=(("w", "numpy"),))
def leaves_of_every_kind(params, x):
    y = x @ params["w"] * params["scalar"] + x @ jnp.asarray(params["numpy"]) * params["number"]
    return {"y": y + jax.random.uniform(params["key"][1, 0], ()), "n": params["steps"].sum(), "flag": params["flag"]}


def bare_reference(params, x, see):
    see("", x)
    return x @ params


@case(lambda: normal(D, F), bare_reference)
def bare_array(w, x):
    return x @ w


# ----------------------------------------------------------------------------------------------------------------- Flax


class LinenModel(nn.Module):
    """Every layer that holds a matrix, and norms and biases beside them."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(V, D, name="embed")
        x = nn.LayerNorm(name="norm")(embed(ids))
        q = nn.DenseGeneral((H, HEAD), name="q")(x)
        k = nn.DenseGeneral((H, HEAD), name="k")(x)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="o")(q * nn.tanh(k))
        x = nn.Einsum((D, 2, F), "btd,dcf->btcf", name="gates")(x)
        return embed.attend(nn.Dense(D, name="down")(x[..., 0, :] * x[..., 1, :]))


def random_like(shapes):
    """Parameters of these shapes; Flax starts biases at zero and scales at one, which would hide mistakes."""
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [normal(*a.shape, seed=i) for i, a in enumerate(leaves)])


@functools.cache
def linen_shapes(module, shape, dtype):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape, dtype))


def layer_norm(x, w):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * w["scale"] + w["bias"]


def flax_reference(params, ids, see, root="params/", embedding="embedding"):
    """The model above, and its NNX twin."""
    for key in root.split("/")[:-1]:
        params = params[key]
    table = params["embed"][embedding]
    x = layer_norm(table[ids], params["norm"])
    see(f"{root}q/kernel", x)
    see(f"{root}k/kernel", x)
    q = jnp.einsum("btd,dhk->bthk", x, params["q"]["kernel"]) + params["q"]["bias"]
    k = jnp.einsum("btd,dhk->bthk", x, params["k"]["kernel"]) + params["k"]["bias"]
    y = (q * jnp.tanh(k)).reshape(*ids.shape, -1)
    see(f"{root}o/kernel", y)
    x = x + y @ params["o"]["kernel"].reshape(-1, D) + params["o"]["bias"]
    see(f"{root}gates/kernel", x)
    x = jnp.einsum("btd,dcf->btcf", x, params["gates"]["kernel"]) + params["gates"]["bias"]
    x = x[..., 0, :] * x[..., 1, :]
    see(f"{root}down/kernel", x)
    x = x @ params["down"]["kernel"] + params["down"]["bias"]
    see(f"{root}embed/{embedding}", x)
    return x @ table.T


def flax_axes(root):
    head = {"q": ((0,), (1, 2)), "k": ((0,), (1, 2)), "o": ((0, 1), (2,)), "gates": ((0,), (1, 2))}
    return {f"{root}{k}/kernel": v for k, v in head.items()} | {f"{root}embed/embedding": ((1,), (0,))}


@case(
    lambda: random_like(linen_shapes(LinenModel(), (B, T), jnp.int32)),
    flax_reference,
    batches=tokens,
    axes=flax_axes("params/"),
    shared=(("params/q/kernel", "params/k/kernel"),),
    lookups=frozenset({"params/embed/embedding"}),
    noted=frozenset({f"params/{k}/bias" for k in ("q", "k", "gates")}),
)
def linen(params, ids):
    return LinenModel().apply(params, ids)


class LinenBlock(nn.Module):
    """One layer of a scanned linen model."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.RMSNorm(name="norm")(x)
        return x + nn.Dense(D, name="down")(nn.tanh(nn.Dense(F, name="up")(h))), None


class LinenScan(nn.Module):
    """Layers in nn.remat in nn.scan."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=L)
        return layers(name="layers")(x, None)[0]


def linen_scan_reference(params, x, see):
    layers = params["params"]["layers"]
    for i in range(L):
        w = layer(layers, i)
        h = norm(x, w["norm"]["scale"])
        see("params/layers/up/kernel", h, i)
        h = jnp.tanh(h @ w["up"]["kernel"] + w["up"]["bias"])
        see("params/layers/down/kernel", h, i)
        x = x + h @ w["down"]["kernel"] + w["down"]["bias"]
    return x


@case(
    lambda: random_like(linen_shapes(LinenScan(), (B, T, D), jnp.float32)),
    linen_scan_reference,
    noted=frozenset({"params/layers/norm/scale", "params/layers/up/bias", "params/layers/down/bias"}),
)
def linen_scan_remat(params, x):
    return LinenScan().apply(params, x)


class NNXModel(nnx.Module):
    """The linen model above, in NNX."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.q = nnx.LinearGeneral(D, (H, HEAD), rngs=rngs)
        self.k = nnx.LinearGeneral(D, (H, HEAD), rngs=rngs)
        self.o = nnx.LinearGeneral((H, HEAD), D, axis=(-2, -1), rngs=rngs)
        self.gates = nnx.Einsum("btd,dcf->btcf", (D, 2, F), (2, F), rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, ids):
        x = self.norm(self.embed(ids))
        x = x + self.o(self.q(x) * jnp.tanh(self.k(x)))
        x = self.gates(x)
        return self.embed.attend(self.down(x[..., 0, :] * x[..., 1, :]))


@functools.cache
def nnx_split(make):
    """The static part of a model, and the shapes of its parameters."""
    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, nnx.to_pure_dict(state)


def nnx_model():
    return NNXModel(nnx.Rngs(0))


@case(
    lambda: random_like(nnx_split(nnx_model)[1]),
    partial(flax_reference, root=""),
    batches=tokens,
    axes=flax_axes(""),
    shared=(("q/kernel", "k/kernel"),),
    lookups=frozenset({"embed/embedding"}),
    noted=frozenset({"q/bias", "k/bias", "gates/bias"}),
    name="nnx",
)
def _(params, ids):
    return nnx.merge(nnx_split(nnx_model)[0], params)(ids)


class NNXBlock(nnx.Module):
    """One layer of a scanned NNX model."""

    def __init__(self, rngs):
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


def nnx_stack():
    return nnx.vmap(lambda rngs: NNXBlock(rngs), in_axes=0, out_axes=0)(nnx.Rngs(0).split(L))


def nnx_scan_reference(params, x, see):
    for i in range(L):
        w = layer(params, i)
        see("up/kernel", x, i)
        h = jnp.tanh(x @ w["up"]["kernel"] + w["up"]["bias"])
        see("down/kernel", h, i)
        x = x + h @ w["down"]["kernel"] + w["down"]["bias"]
    return x


@case(
    lambda: random_like(nnx_split(nnx_stack)[1]),
    nnx_scan_reference,
    noted=frozenset({"up/bias", "down/bias"}),
    name="nnx_scan_remat",
)
def _(params, x):
    model = nnx.merge(nnx_split(nnx_stack)[0], params)
    step = nnx.scan(nnx.remat(lambda x, block: block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return step(x, model)
