"""Causal self-attention."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.models.config import DecoderConfig
from jaxquant.models.parts import capped, dense, norm
from jaxquant.models.rope import rotate

EVERYTHING = 2**31 - 1  # the window of a layer that sees all positions: one program serves layers of both kinds


class Attention(nn.Module):
    """Causal self-attention; several query heads may share one key and value head (arXiv:2305.13245)."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, window: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Maps `x` `[batch, time, hidden]` to the same shape.

        `window`, int32 `[]`, is how many positions one sees, itself included. `cos` and `sin` are the tables of
        `rope_tables`: the first for layers that see everything, the last for layers with a window; none is no rotation.
        """
        config = self.config
        query, key, value = self._projected(x)
        if config.qk_norm:
            query = norm(config, self.dtype, "q_norm")(query)
            key = norm(config, self.dtype, "k_norm")(key)
        if cos.shape[0]:
            kind = jnp.where(window == EVERYTHING, 0, cos.shape[0] - 1)
            query, key = (rotate(heads, cos[kind], sin[kind]) for heads in (query, key))
        mixed = causal_attention(query, key, value, window, config.attention_scalar, config.attention_cap)
        mixed = mixed.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
        return dense("o_proj", config.hidden_size, self.dtype, config.o_bias)(mixed)

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


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    window: jax.Array,
    scalar: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attends to the present and the past, as far back as the window reaches.

    `query` is `[batch, time, heads, head_dim]`, `key` and `value` `[batch, time, kv_heads, head_dim]` where `kv_heads`
    divides `heads`; `window`, int32 `[]`, is how many positions one sees, itself included. Scores are divided by the
    root of `scalar`, None for `head_dim`, and then capped. Returns the shape and dtype of `query`.
    """
    batch, time, heads, head_dim = query.shape
    grouped = query.reshape(batch, time, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    scores = capped(scores / math.sqrt(head_dim if scalar is None else scalar), cap)
    positions = jnp.arange(time, dtype=jnp.int32)
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < window)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(query.dtype), value)
    return mixed.reshape(query.shape)
