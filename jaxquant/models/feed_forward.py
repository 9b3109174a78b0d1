"""The feed-forward network of a layer: one, or several of which each token chooses a few.

The experts of a mixture (arXiv:2401.04088) are stacked, `[experts, in, out]`. Tokens are sorted by expert, so that each
product is one `ragged_dot` of consecutive rows, whatever the tokens choose.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.models.config import DecoderConfig
from jaxquant.models.parts import ACTIVATIONS, INIT, dense


class MLP(nn.Module):
    """The feed-forward network, gated (arXiv:2002.05202) or not."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` `[..., hidden]` to the same shape."""
        config, size = self.config, self.config.intermediate_size
        activation = ACTIVATIONS[config.activation]
        if not config.gated:
            inner = activation(self._dense("up_proj", size)(x))
        elif config.fused:
            gate, up = jnp.split(self._dense("gate_up_proj", 2 * size)(x), 2, axis=-1)
            inner = activation(gate) * up
        else:
            inner = activation(self._dense("gate_proj", size)(x)) * self._dense("up_proj", size)(x)
        return self._dense("down_proj", config.hidden_size)(inner)

    def _dense(self, name: str, features: int) -> nn.Dense:
        return dense(name, features, self.dtype, self.config.mlp_bias)


class Mixture(nn.Module):
    """Gated feed-forward networks, of which a router chooses some for each token and adds up what they give."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x` `[..., hidden]` to the same shape."""
        config = self.config
        tokens = x.reshape(-1, x.shape[-1])
        logits = dense("gate", config.num_experts, self.dtype)(tokens)
        chances = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, chosen = jax.lax.top_k(chances, config.experts_per_token)  # [tokens, experts_per_token]
        if config.normalize_routing:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1))
        rows = tokens[order // config.experts_per_token]
        sizes = jnp.bincount(chosen.reshape(-1), length=config.num_experts).astype(jnp.int32)
        given = Experts(config, self.dtype, name="experts")(rows, sizes)[jnp.argsort(order)]
        given = given.reshape(*chosen.shape, -1).astype(jnp.float32) * weights[..., None]
        return jnp.sum(given, axis=1).astype(self.dtype).reshape(x.shape)


class Experts(nn.Module):
    """All experts of a layer, each applied to rows of its own."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Maps `rows` `[rows, hidden]`, of which the first `sizes[0]` are the first expert's, to the same shape."""
        config = self.config
        gate = self._linear("gate_proj", config.intermediate_size)(rows, sizes)
        up = self._linear("up_proj", config.intermediate_size)(rows, sizes)
        return self._linear("down_proj", config.hidden_size)(ACTIVATIONS[config.activation](gate) * up, sizes)

    def _linear(self, name: str, features: int) -> "ExpertLinear":
        return ExpertLinear(self.config.num_experts, features, self.dtype, name=name)


class ExpertLinear(nn.Module):
    """A linear layer for each expert, `[experts, in, out]`."""

    experts: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """Maps `rows` `[rows, in]`, sorted by expert with `sizes` `[experts]` of each, to `[rows, out]`."""
        kernel = self.param("kernel", INIT, (self.experts, rows.shape[-1], self.features))
        return jax.lax.ragged_dot(rows, kernel.astype(self.dtype), sizes)
