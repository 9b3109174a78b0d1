"""Causal self-attention, from the start of a text or on from a `Past`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.models.config import DecoderConfig
from jaxquant.models.parts import capped, dense, norm
from jaxquant.models.rope import rotate
from jaxquant.numerics.kv_cache import KVCache, append, fill, read

EVERYTHING = 2**31 - 1  # the window of a layer that sees all positions: one program serves layers of both kinds


class Past(NamedTuple):
    """What attention has seen: the cache of each layer, stacked, and the first token of each sequence.

    `start` is int32 `[batch]`; what lies before it was filled in, and is never looked at.
    """

    cache: KVCache
    start: jax.Array


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
        for layers with a window; none is no rotation.
        """
        config = self.config
        query, key, value = self._projected(x)
        if config.qk_norm:
            query = norm(config, self.dtype, "q_norm")(query)
            key = norm(config, self.dtype, "k_norm")(key)
        if cos.shape[0]:
            kind = jnp.where(window == EVERYTHING, 0, cos.shape[0] - 1)
            query, key = (rotate(heads, cos[kind], sin[kind]) for heads in (query, key))
        memory, past = remembered(key, value, past)
        mixed = causal_attention(query, memory, window, config.attention_scalar, config.attention_cap)
        mixed = mixed.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
        return dense("o_proj", config.hidden_size, self.dtype, config.o_bias)(mixed), past

    def _projected(self, x: jax.Array) -> list[jax.Array]:
        """Queries, keys and values, each `[batch, time, heads, head_dim]`."""
        config = self.config
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
        sizes = [count * config.head_dim for count in heads.values()]
        if config.fused:
            together = dense("qkv_proj", sum(sizes), self.dtype, config.qkv_bias)(x)
            parts = jnp.split(together, [sizes[0], sizes[0] + sizes[1]], axis=-1)
        else:
            named = zip(heads, sizes, strict=True)
            parts = [dense(name, size, self.dtype, config.qkv_bias)(x) for name, size in named]
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
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    key, value = (heads.swapaxes(1, 2) for heads in (memory.key, memory.value))  # products in order are fast on CPUs
    scores = jnp.einsum("bkgtd,bksd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = capped(scores / math.sqrt(head_dim if scalar is None else scalar), cap)
    own = memory.length - time + jnp.arange(time, dtype=jnp.int32)
    distance = own[:, None] - memory.positions
    seen = (distance >= 0) & (distance < window) & (memory.positions >= 0)
    if memory.start is not None:  # what was filled in sees itself, so that nothing is divided by zero
        seen &= (memory.positions >= memory.start[:, None, None]) | (distance == 0)
        seen = seen[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(query.dtype), value)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape)
