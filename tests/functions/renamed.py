"""Weights that are renamed on the way to their product: cast, transposed, reshaped, sliced."""

import jax.numpy as jnp
from jax import lax

from functions.cases import HEAD, SQUARE, B, D, F, H, T, act, case, normal, simple_reference


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
    q = act(q) * jnp.arange(1, H + 1, dtype=x.dtype)[:, None]
    see("o", q.reshape(B, T, H * HEAD))
    return jnp.einsum("bthk,hkd->btd", q, params["o"])


HEADS = lambda: {"q": normal(D, H, HEAD), "o": normal(H, HEAD, F)}  # noqa: E731
HEADS_AXES = {"q": ((0,), (1, 2)), "o": ((0, 1), (2,))}


@case(HEADS, heads_reference, axes=HEADS_AXES)
def heads_by_einsum(params, x):
    q = act(jnp.einsum("btd,dhk->bthk", x, params["q"])) * jnp.arange(1, H + 1, dtype=x.dtype)[:, None]
    return jnp.einsum("bthk,hkd->btd", q, params["o"])


@case(HEADS, heads_reference, axes=HEADS_AXES)
def heads_by_reshape(params, x):
    q = (x @ params["q"].reshape(D, -1)).reshape(B, T, H, HEAD)
    q = act(q) * jnp.arange(1, H + 1, dtype=x.dtype)[:, None]
    return q.reshape(B, T, -1) @ params["o"].reshape(-1, F)


@case(HEADS, heads_reference, axes=HEADS_AXES)
def heads_in_another_order(params, x):
    """The contracting axes are paired in the reverse of the weight's order."""
    q = act(jnp.einsum("dhk,btd->btkh", params["q"], x)) * jnp.arange(1, H + 1, dtype=x.dtype)
    return jnp.einsum("btkh,hkd->btd", q, params["o"])


def fused_index_reference(params, x, see):
    see("w", x)
    q, k, v = (x @ params["w"][:, i] for i in range(3))
    return q * k + v


@case(lambda: {"w": normal(D, 3, F)}, fused_index_reference, axes={"w": ((0,), (1, 2))})
def fused_qkv_indexed(params, x):
    q, k, v = (x @ params["w"][:, i] for i in range(3))
    return q * k + v


def fused_split_reference(params, x, see):
    see("w", x)
    q, k, v = jnp.split(x @ params["w"], 3, -1)
    return q * k + v


def one_channel_reference(params, x, see):
    see("w", x)
    return x @ params["w"][0]


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


@case(FUSED, fused_split_reference)
def fused_qkv_scanned(params, x):
    """The input is the same for every slice of columns, and counts once."""
    parts = jnp.moveaxis(params["w"].reshape(D, 3, F), 1, 0)
    _, (q, k, v) = lax.scan(lambda c, part: (c, x @ part), None, parts)
    return q * k + v


@case(lambda: {"w": normal(1, D, F)}, one_channel_reference, axes={"w": ((0, 1), (2,))})
def contracting_axis_of_one(params, x):
    return jnp.einsum("btkd,kdf->btf", x[:, :, None], params["w"])


def column_reference(params, x, see):
    see("w", x)
    return x @ params["w"] + (x @ params["w"][:, :1])


@case(lambda: {"w": normal(D, F)}, column_reference)
def one_column_and_all(params, x):
    return x @ params["w"] + x @ params["w"][:, :1]


@case(SQUARE, lambda p, x, see: simple_reference({"w": p["w"][:, :1]}, x, see))
def one_column(params, x):
    return x @ params["w"][:, :1]
