"""The decoder: one small Flax module for every supported family, its layers stacked and scanned.

A layer's parameters have a leading layer axis (`layers/mlp/down_proj/kernel` is `[layers, in, out]`), so the program
does not grow with the depth and a quantization method can be `vmap`ped over the layers; see `stacking` for the other
way. Names follow Hugging Face.
What a family has beyond the others (biases, norms of queries and keys, windows) is switched on by the configuration.
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


def _dense(name: str, features: int, dtype: jnp.dtype, bias: bool = False) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=_INIT, name=name)


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
    def __call__(self, x: jax.Array, window: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        """Maps `x` `[batch, time, hidden]` to the same shape.

        `window` is that of `causal_attention`, `cos` and `sin` are `[time, head_dim / 2]`.
        """
        config = self.config
        query = self._heads("q_proj", config.num_heads, x)
        key = self._heads("k_proj", config.num_kv_heads, x)
        value = self._heads("v_proj", config.num_kv_heads, x)
        if config.qk_norm:
            query = RMSNorm(config.norm_eps, self.dtype, name="q_norm")(query)
            key = RMSNorm(config.norm_eps, self.dtype, name="k_norm")(key)
        mixed = causal_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, window)
        mixed = mixed.reshape(*x.shape[:-1], config.num_heads * config.head_dim)
        return _dense("o_proj", config.hidden_size, self.dtype, config.o_bias)(mixed)

    def _heads(self, name: str, heads: int, x: jax.Array) -> jax.Array:
        projected = _dense(name, heads * self.config.head_dim, self.dtype, self.config.qkv_bias)(x)
        return projected.reshape(*x.shape[:-1], heads, self.config.head_dim)


def causal_attention(query: jax.Array, key: jax.Array, value: jax.Array, window: jax.Array) -> jax.Array:
    """Attends to the present and the past, as far back as the window reaches.

    `query` is `[batch, time, heads, head_dim]`, `key` and `value` `[batch, time, kv_heads, head_dim]` where `kv_heads`
    divides `heads`; `window`, int32 `[]`, is how many positions one sees, itself included. Returns the shape and dtype
    of `query`.
    """
    batch, time, heads, head_dim = query.shape
    grouped = query.reshape(batch, time, key.shape[2], heads // key.shape[2], head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    positions = jnp.arange(time, dtype=jnp.int32)
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < window)
    weights = jax.nn.softmax(jnp.where(seen, scores / math.sqrt(head_dim), -jnp.inf), axis=-1)
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
        return _dense(name, features, self.dtype, self.config.mlp_bias)


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each normalized before and added to the residual stream."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, window: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, None]:
        """Maps `x` `[batch, time, hidden]` to `(x, None)`, the carry and the empty output of a scan."""
        attention = Attention(self.config, self.dtype, name="self_attn")
        x = x + attention(self._norm("input_layernorm")(x), window, cos, sin)
        x = x + MLP(self.config, self.dtype, name="mlp")(self._norm("post_attention_layernorm")(x))
        return x, None

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_eps, self.dtype, name=name)


EVERYTHING = 2**31 - 1  # the window of a layer that sees all positions: one program serves layers of both kinds


def _scanned(config: DecoderConfig, dtype: jnp.dtype, length: int) -> nn.Module:
    """Some layers, one after the other: maps `(x, windows, *rope_tables)` to `(x, None)`."""
    scan = nn.scan(
        DecoderLayer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=length,
        check_constancy_invariants=False,  # an extra trace, for a feature that is not used
    )
    return scan(config, dtype, name="layers")


def window_sizes(config: DecoderConfig) -> jax.Array:
    """The window of each layer, int32 `[layers]`."""
    return jnp.array([EVERYTHING if window is None else window for window in config.windows], jnp.int32)


class Layers(nn.Module):
    """Some of a decoder's layers alone."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, windows: jax.Array) -> jax.Array:
        """Maps `x` `[batch, time, hidden]` to the same shape; `windows`, int32, has an entry per layer."""
        config = self.config
        tables = rope_tables(x.shape[-2], config.head_dim, config.rope_theta, config.rope_scaling)
        return _scanned(config, self.dtype, len(windows))(x, windows, *tables)[0]


class Unstacked(nn.Module):
    """All layers of a decoder, each with parameters of its own: "0", "1" and so on."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, windows: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, None]:
        """As a scan over the layers: maps `x` `[batch, time, hidden]` to `(x, None)`."""
        for i in range(self.config.num_layers):
            x, _ = DecoderLayer(self.config, self.dtype, name=str(i))(x, windows[i], cos, sin)
        return x, None


class Decoder(nn.Module):
    """A causal language model: embedding, layers, norm, head (tied to the embedding or its own kernel)."""

    config: DecoderConfig
    dtype: jnp.dtype
    stacked: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps token ids, integer `[batch, time]`, to logits, float32 `[batch, time, vocab]`."""
        config = self.config
        embed = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=_INIT, name="embed_tokens"
        )
        tables = rope_tables(tokens.shape[-1], config.head_dim, config.rope_theta, config.rope_scaling)
        if self.stacked:
            layers = _scanned(config, self.dtype, config.num_layers)
        else:
            layers = Unstacked(config, self.dtype, name="layers")
        x, _ = layers(embed(tokens), window_sizes(config), *tables)
        x = RMSNorm(config.norm_eps, self.dtype, name="norm")(x)
        head = embed.attend if config.tie_embeddings else _dense("lm_head", config.vocab_size, self.dtype)
        return head(x).astype(jnp.float32)
