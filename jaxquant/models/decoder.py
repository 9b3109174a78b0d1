"""The decoder: one small Flax module for every supported family, its layers stacked and scanned.

A layer's parameters have a leading layer axis (`layers/mlp/down_proj/kernel` is `[layers, in, out]`), so the program
does not grow with the depth and a quantization method can be `vmap`ped over the layers; see `stacking` for the other
way. Names follow Hugging Face.
What a family has beyond the others (biases, norms of queries and keys, windows) is switched on by the configuration.
The operations are plain ones (products, a scan, a gather): nothing here knows about quantization.

Norms, rotary embedding, softmax and logits are computed in float32, everything else in the module's `dtype`.

Every module can also go on from a `Past`, the keys and values of the tokens before; it then returns a new one.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.models.config import DecoderConfig
from jaxquant.models.rope import Rope, rope_tables, rotate
from jaxquant.numerics.kv_cache import KVCache, append, fill, read

_INIT = nn.initializers.normal(0.02)


def _dense(name: str, features: int, dtype: jnp.dtype, bias: bool = False) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=_INIT, name=name)


EVERYTHING = 2**31 - 1  # the window of a layer that sees all positions: one program serves layers of both kinds
ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": nn.gelu}


class Past(NamedTuple):
    """What attention has seen: the cache of each layer, stacked, and the first token of each sequence.

    `start` is int32 `[batch]`; what lies before it was filled in, and is never looked at.
    """

    cache: KVCache
    start: jax.Array


class RMSNorm(nn.Module):
    """Root mean square normalization (arXiv:1910.07467) over the last axis, in float32.

    The scale is `offset` and a parameter.
    """

    eps: float
    dtype: jnp.dtype
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` `[..., features]`; returns the same shape in `dtype`."""
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * (self.offset + scale.astype(jnp.float32))).astype(self.dtype)


def _norm(config: DecoderConfig, dtype: jnp.dtype, name: str) -> RMSNorm:
    return RMSNorm(config.norm_eps, dtype, config.norm_offset, name=name)


def _capped(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


class Attention(nn.Module):
    """Causal self-attention; several query heads may share one key and value head (arXiv:2305.13245)."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, window: jax.Array, past: Past | None, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, Past | None]:
        """Maps `x` `[batch, time, hidden]` to the same shape, and to the past after it.

        `window`, int32 `[]`, is how many positions one sees, itself included. `past` is that of this layer. `cos` and
        `sin` are the tables of `rope_tables` at the positions of x: the first for layers that see everything, the last
        for layers with a window.
        """
        config = self.config
        query, key, value = self._projected(x)
        if config.qk_norm:
            query = _norm(config, self.dtype, "q_norm")(query)
            key = _norm(config, self.dtype, "k_norm")(key)
        kind = jnp.where(window == EVERYTHING, 0, cos.shape[0] - 1)
        query, key = (rotate(heads, cos[kind], sin[kind]) for heads in (query, key))
        memory, past = remembered(key, value, past)
        mixed = causal_attention(query, memory, window, config.attention_scalar, config.attention_cap)
        mixed = mixed.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
        return _dense("o_proj", config.hidden_size, self.dtype, config.o_bias)(mixed), past

    def _projected(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values, each `[batch, time, heads, head_dim]`."""
        config = self.config
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
        sizes = [count * config.head_dim for count in heads.values()]
        if config.fused:
            together = _dense("qkv_proj", sum(sizes), self.dtype, config.qkv_bias)(x)
            parts = jnp.split(together, [sizes[0], sizes[0] + sizes[1]], axis=-1)
        else:
            named = zip(heads, sizes, strict=True)
            parts = [_dense(name, size, self.dtype, config.qkv_bias)(x) for name, size in named]
        return [part.reshape(*part.shape[:-1], -1, config.head_dim) for part in parts]


class Memory(NamedTuple):
    """What queries, the last of all positions, attend to.

    Attributes:
      key, value: `[batch, slots, kv_heads, head_dim]`.
      positions: of the slots, int32 `[slots]`; negative where a slot is empty.
      length: positions there are, the queries' own included.
      start: the first position of each sequence, int32 `[batch]`; None is 0.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    length: int | jax.Array
    start: jax.Array | None


def remembered(key: jax.Array, value: jax.Array, past: Past | None) -> tuple[Memory, Past | None]:
    """What to attend to, new keys and values `[batch, time, kv_heads, head_dim]` included, and the past after them.

    Without a past, or with an empty one, that is the new ones alone, as they are. Otherwise there is one new token.
    """
    time = key.shape[1]
    positions = jnp.arange(time, dtype=jnp.int32)
    if past is None:
        return Memory(key, value, positions, time, None), None
    if time > 1:
        real = (positions >= past.start[:, None])[..., None, None]
        key, value = (jnp.where(real, heads, jnp.zeros_like(heads)) for heads in (key, value))
        return Memory(key, value, positions, time, past.start), past._replace(cache=fill(past.cache, key, value))
    past = past._replace(cache=append(past.cache, key, value))
    return Memory(*read(past.cache), past.cache.length, past.start), past


def causal_attention(
    query: jax.Array, memory: Memory, window: jax.Array, scalar: float | None = None, cap: float | None = None
) -> jax.Array:
    """Attends to the present and the past, as far back as the window reaches.

    `query` is `[batch, time, heads, head_dim]`, where `heads` is a multiple of the memory's; `window`, int32 `[]`, is
    how many positions one sees, itself included. Scores are divided by the root of `scalar`, None for `head_dim`, and
    then capped. Returns the shape and dtype of `query`.
    """
    batch, time, heads, head_dim = query.shape
    kv_heads = memory.key.shape[2]
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, memory.key, preferred_element_type=jnp.float32)
    scores = _capped(scores / math.sqrt(head_dim if scalar is None else scalar), cap)
    own = memory.length - time + jnp.arange(time, dtype=jnp.int32)
    distance = own[:, None] - memory.positions
    seen = (distance >= 0) & (distance < window) & (memory.positions >= 0)
    if memory.start is not None:  # what was filled in sees itself, so that nothing is divided by zero
        seen &= (memory.positions >= memory.start[:, None, None]) | (distance == 0)
        seen = seen[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(query.dtype), memory.value)
    return mixed.reshape(query.shape)


class MLP(nn.Module):
    """The gated feed-forward network (arXiv:2002.05202)."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` `[..., hidden]` to the same shape."""
        size = self.config.intermediate_size
        if self.config.fused:
            gate, up = jnp.split(self._dense("gate_up_proj", 2 * size)(x), 2, axis=-1)
        else:
            gate, up = self._dense("gate_proj", size)(x), self._dense("up_proj", size)(x)
        activation = ACTIVATIONS[self.config.activation]
        return self._dense("down_proj", self.config.hidden_size)(activation(gate) * up)

    def _dense(self, name: str, features: int) -> nn.Dense:
        return _dense(name, features, self.dtype, self.config.mlp_bias)


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each normalized before, maybe after too, and added to the residual stream."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, window: jax.Array, past: Past | None, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, Past | None]:
        """Maps `x` `[batch, time, hidden]` and the past of this layer to the same, the carry and output of a scan."""
        attention = Attention(self.config, self.dtype, name="self_attn")
        mlp = MLP(self.config, self.dtype, name="mlp")
        if self.config.post_norms:
            mixed, past = attention(self._norm("input_layernorm")(x), window, past, cos, sin)
            x = x + self._norm("post_attention_layernorm")(mixed)
            fed = mlp(self._norm("pre_feedforward_layernorm")(x))
            return x + self._norm("post_feedforward_layernorm")(fed), past
        mixed, past = attention(self._norm("input_layernorm")(x), window, past, cos, sin)
        x = x + mixed
        return x + mlp(self._norm("post_attention_layernorm")(x)), past

    def _norm(self, name: str) -> RMSNorm:
        return _norm(self.config, self.dtype, name)


def _scanned(config: DecoderConfig, dtype: jnp.dtype, length: int) -> nn.Module:
    """Some layers, one after the other: maps `(x, windows, past, *rope_tables)` to `(x, past)`."""
    scan = nn.scan(
        DecoderLayer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast, nn.broadcast),
        length=length,
        check_constancy_invariants=False,  # an extra trace, for a feature that is not used
    )
    return scan(config, dtype, name="layers")


def window_sizes(config: DecoderConfig) -> jax.Array:
    """The window of each layer, int32 `[layers]`."""
    return jnp.array([EVERYTHING if window is None else window for window in config.windows], jnp.int32)


def ropes(config: DecoderConfig) -> tuple[Rope, ...]:
    """The rotations of layers without a window, and of those with one where it is another."""
    return (config.rope,) if config.local_rope is None else (config.rope, config.local_rope)


def embedded(config: DecoderConfig, embeddings: jax.Array) -> jax.Array:
    """What the first layer reads, from the embeddings of the tokens, in their shape and dtype."""
    if not config.embedding_scaled:
        return embeddings
    return embeddings * jnp.asarray(math.sqrt(config.hidden_size), embeddings.dtype)


class Layers(nn.Module):
    """Some of a decoder's layers alone."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, windows: jax.Array) -> jax.Array:
        """Maps `x` `[batch, time, hidden]` to the same shape; `windows`, int32, has an entry per layer."""
        config = self.config
        tables = rope_tables(x.shape[-2], ropes(config))
        return _scanned(config, self.dtype, len(windows))(x, windows, None, *tables)[0]


class Unstacked(nn.Module):
    """All layers of a decoder, each with parameters of its own: "0", "1" and so on."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, windows: jax.Array, past: Past | None, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, Past | None]:
        """As a scan over the layers: maps `x` `[batch, time, hidden]` and the stacked past to the same."""
        new = []
        for i in range(self.config.num_layers):
            own = jax.tree.map(lambda a, i=i: a[i], past)
            x, after = DecoderLayer(self.config, self.dtype, name=str(i))(x, windows[i], own, cos, sin)
            new.append(after)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *new)


class Decoder(nn.Module):
    """A causal language model: embedding, layers, norm, head (tied to the embedding or its own kernel)."""

    config: DecoderConfig
    dtype: jnp.dtype
    stacked: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array, past: Past | None = None):
        """Maps token ids, integer `[batch, time]`, to logits, float32 `[batch, time, vocab]`.

        With a past, tokens are what follows it: any number if it is empty, else one. Then the result is the logits
        after the last of them, `[batch, vocab]`, and the new past.
        """
        config = self.config
        embed = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=_INIT, name="embed_tokens"
        )
        tables = self._tables(tokens.shape[-1], past)
        if self.stacked:
            layers = _scanned(config, self.dtype, config.num_layers)
        else:
            layers = Unstacked(config, self.dtype, name="layers")
        x, new = layers(embedded(config, embed(tokens)), window_sizes(config), past, *tables)
        x = _norm(config, self.dtype, "norm")(x if past is None else x[:, -1])
        head = embed.attend if config.tie_embeddings else _dense("lm_head", config.vocab_size, self.dtype)
        logits = _capped(head(x).astype(jnp.float32), config.logit_cap)
        return logits if past is None else (logits, new)

    def _tables(self, time: int, past: Past | None) -> tuple[jax.Array, jax.Array]:
        """The tables of `rope_tables` at the positions of new tokens, counted from the first of each sequence."""
        if past is None:
            return rope_tables(time, ropes(self.config))
        slots = past.cache.capacity
        first = past.cache.length[0]
        positions = first + jnp.arange(time, dtype=jnp.int32) - past.start[0][:, None]
        cos, sin = rope_tables(slots, ropes(self.config))
        return cos[:, jnp.maximum(positions, 0)], sin[:, jnp.maximum(positions, 0)]
