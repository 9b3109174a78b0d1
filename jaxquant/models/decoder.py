"""The decoder: one small Flax module for every supported family, its layers stacked and scanned.

A layer's parameters have a leading layer axis (`layers/mlp/down_proj/kernel` is `[layers, in, out]`), so the program
does not grow with the depth and a quantization method can be `vmap`ped over the layers. Names follow Hugging Face.
The operations are plain ones (products, a scan, a gather): nothing here knows about quantization.

Norms, rotary embedding, softmax and logits are computed in float32, everything else in the module's `dtype`.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.models.config import DecoderConfig
from jaxquant.models.rope import rope_tables, rotate

_INIT = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """Root mean square normalization (arXiv:1910.07467) over the last axis, in float32."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` `[..., features]`; returns the same shape in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


class Attention(nn.Module):
    """Causal self-attention; several query heads may share one key and value head (arXiv:2305.13245)."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Maps `x` `[batch, time, hidden]` to the same shape; `cos` and `sin` are `[time, head_dim / 2]`."""
        config = self.config
        query = rotate(self._heads("q_proj", config.num_heads, x), cos, sin)
        key = rotate(self._heads("k_proj", config.num_kv_heads, x), cos, sin)
        value = self._heads("v_proj", config.num_kv_heads, x)
        mixed = causal_attention(query, key, value)
        mixed = mixed.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
        return nn.Dense(config.hidden_size, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name="o_proj")(mixed)

    def _heads(self, name: str, heads: int, x: jax.Array) -> jax.Array:
        width = heads * self.config.head_dim
        projected = nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name=name)(x)
        return projected.reshape(*x.shape[:-1], heads, self.config.head_dim)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attends to the present and the past.

    `query` is `[batch, time, heads, head_dim]`, `key` and `value` `[batch, time, kv_heads, head_dim]` where `kv_heads`
    divides `heads`. Returns the shape and dtype of `query`.
    """
    batch, time, heads, head_dim = query.shape
    grouped = query.reshape(batch, time, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    past = jnp.tril(jnp.ones((time, time), dtype=bool))
    weights = jax.nn.softmax(jnp.where(past, scores / math.sqrt(head_dim), -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(query.dtype), value)
    return mixed.reshape(query.shape)


class MLP(nn.Module):
    """The gated feed-forward network with SiLU (SwiGLU, arXiv:2002.05202)."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` `[..., hidden]` to the same shape."""
        gate = self._dense("gate_proj", self.config.intermediate_size)(x)
        up = self._dense("up_proj", self.config.intermediate_size)(x)
        return self._dense("down_proj", self.config.hidden_size)(nn.silu(gate) * up)

    def _dense(self, name: str, features: int) -> nn.Dense:
        return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name=name)


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each normalized before and added to the residual stream."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, None]:
        """Maps `x` `[batch, time, hidden]` to `(x, None)`, the carry and the empty output of a scan."""
        x = x + Attention(self.config, self.dtype, name="self_attn")(self._norm("input_layernorm")(x), cos, sin)
        x = x + MLP(self.config, self.dtype, name="mlp")(self._norm("post_attention_layernorm")(x))
        return x, None

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_eps, self.dtype, name=name)


class Decoder(nn.Module):
    """A causal language model: embedding, scanned layers, norm, head (tied to the embedding or its own kernel)."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps token ids, integer `[batch, time]`, to logits, float32 `[batch, time, vocab]`."""
        config = self.config
        embed = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=_INIT, name="embed_tokens"
        )
        tables = rope_tables(tokens.shape[-1], config.head_dim, config.rope_theta, config.rope_scaling)
        layers = nn.scan(
            DecoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
            check_constancy_invariants=False,  # an extra trace, for a feature that is not used
        )
        x, _ = layers(config, self.dtype, name="layers")(embed(tokens), *tables)
        x = RMSNorm(config.norm_eps, self.dtype, name="norm")(x)
        if config.tie_embeddings:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(config.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name="lm_head")(x)
        return logits.astype(jnp.float32)
