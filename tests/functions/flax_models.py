"""Models in Flax's linen and NNX."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from functions.cases import HEAD, B, D, F, H, L, T, V, case, layer, norm, normal, tokens


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


def new_nnx_model():
    return NNXModel(nnx.Rngs(0))


@case(
    lambda: random_like(nnx_split(new_nnx_model)[1]),
    partial(flax_reference, root=""),
    batches=tokens,
    axes=flax_axes(""),
    shared=(("q/kernel", "k/kernel"),),
    lookups=frozenset({"embed/embedding"}),
    noted=frozenset({"q/bias", "k/bias", "gates/bias"}),
)
def nnx_model(params, ids):
    return nnx.merge(nnx_split(new_nnx_model)[0], params)(ids)


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
)
def nnx_scan_remat(params, x):
    model = nnx.merge(nnx_split(nnx_stack)[0], params)
    step = nnx.scan(nnx.remat(lambda x, block: block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return step(x, model)
