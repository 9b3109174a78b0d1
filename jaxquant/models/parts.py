"""What all modules of the decoder are made of: linear layers, norms and activations."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.models.config import DecoderConfig

INIT = nn.initializers.normal(0.02)
ACTIVATIONS = {
    "silu": nn.silu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
}


def dense(name: str, features: int, dtype: jnp.dtype, bias: bool = False) -> nn.Dense:
    """A linear layer."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=INIT, name=name)


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


class LayerNorm(nn.Module):
    """Layer normalization (arXiv:1607.06450) over the last axis, in float32, with scale and bias."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` `[..., features]`; returns the same shape in `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


def norm(config: DecoderConfig, dtype: jnp.dtype, name: str) -> nn.Module:
    """A norm of the decoder's kind."""
    kind = LayerNorm if config.layer_norms else functools.partial(RMSNorm, offset=config.norm_offset)
    return kind(config.norm_eps, dtype, name=name)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap` · tanh(x / `cap`), or x where there is none."""
    return x if cap is None else cap * jnp.tanh(x / cap)
