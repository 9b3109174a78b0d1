"""The decoder: one small Flax module for every supported family, its layers stacked and scanned.

A layer's parameters have a leading layer axis (`layers/mlp/down_proj/kernel` is `[layers, in, out]`), so the program
does not grow with the depth and a quantization method can be `vmap`ped over the layers; see `stacking` for the other
way. Names follow Hugging Face.
What a family has beyond the others (biases, norms of queries and keys, experts) is switched on by the configuration.
The operations are plain ones (products, a scan, a gather): nothing here knows about quantization.

Norms, rotary embedding, softmax and logits are computed in float32, everything else in the module's `dtype`.

Every module can also go on from a `Past`, the keys and values of the tokens before; it then returns a new one.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxquant.models.attention import EVERYTHING, Attention, Past
from jaxquant.models.config import DecoderConfig
from jaxquant.models.feed_forward import MLP, Mixture
from jaxquant.models.parts import INIT, capped, dense, norm
from jaxquant.models.rope import Rope, rope_tables


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
        mlp = (Mixture if self.config.num_experts else MLP)(self.config, self.dtype, name="mlp")
        if self.config.post_norms:
            mixed, past = attention(self._norm("input_layernorm")(x), window, past, cos, sin)
            x = x + self._norm("post_attention_layernorm")(mixed)
            fed = mlp(self._norm("pre_feedforward_layernorm")(x))
            return x + self._norm("post_feedforward_layernorm")(fed), past
        mixed, past = attention(self._norm("input_layernorm")(x), window, past, cos, sin)
        x = x + mixed
        return x + mlp(self._norm("post_attention_layernorm")(x)), past

    def _norm(self, name: str) -> nn.Module:
        return norm(self.config, self.dtype, name)


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
    return tuple(rope for rope in (config.rope, config.local_rope) if rope is not None)


def _embed(config: DecoderConfig, dtype: jnp.dtype, tokens: jax.Array, past: Past | None) -> tuple[jax.Array, nn.Embed]:
    """What the first layer reads, `[batch, time, hidden]`, and the embedding of tokens; within a compact module."""

    def table(name: str, rows: int) -> nn.Embed:
        return nn.Embed(rows, config.hidden_size, dtype=dtype, embedding_init=INIT, name=name)

    embed, length = table("embed_tokens", config.vocab_size), tokens.shape[-1]
    x = embed(tokens)
    if config.embedding_scaled:
        x = x * jnp.asarray(math.sqrt(config.hidden_size), dtype)
    if config.position_offset is None:
        return x, embed
    if length > config.max_position_embeddings:
        raise ValueError(
            f"tokens: {length} in a sequence, but the model has learned {config.max_position_embeddings} positions; "
            "use shorter sequences"
        )
    positions = _positions(length, past) + config.position_offset
    return x + table("embed_positions", config.max_position_embeddings + config.position_offset)(positions), embed


def _positions(time: int, past: Past | None) -> jax.Array:
    """The positions of new tokens, int32 `[time]`, or counted from the first of each sequence, `[batch, time]`."""
    positions = jnp.arange(time, dtype=jnp.int32)
    if past is None:
        return positions
    return jnp.maximum(past.cache.length[0] + positions - past.start[0][:, None], 0)


def _rope_tables(config: DecoderConfig, time: int, past: Past | None) -> tuple[jax.Array, jax.Array]:
    """The tables of `rope_tables` at these positions; sequences are as long as they are with the new tokens."""
    length = time if past is None else past.cache.length[0] + time - past.start[0]
    return rope_tables(_positions(time, past), length, ropes(config))


class Embeddings(nn.Module):
    """What stands before a decoder's layers alone."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps token ids, integer `[batch, time]`, to `[batch, time, hidden]`."""
        return _embed(self.config, self.dtype, tokens, None)[0]


class Layers(nn.Module):
    """Some of a decoder's layers alone."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, windows: jax.Array) -> jax.Array:
        """Maps `x` `[batch, time, hidden]` to the same shape; `windows`, int32, has an entry per layer."""
        config = self.config
        tables = _rope_tables(config, x.shape[-2], None)
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
        x, embed = _embed(config, self.dtype, tokens, past)
        tables = _rope_tables(config, tokens.shape[-1], past)
        if self.stacked:
            layers = _scanned(config, self.dtype, config.num_layers)
        else:
            layers = Unstacked(config, self.dtype, name="layers")
        x, new = layers(x, window_sizes(config), past, *tables)
        x = norm(config, self.dtype, "norm")(x if past is None else x[:, -1])
        head = embed.attend if config.tie_embeddings else dense("lm_head", config.vocab_size, self.dtype)
        logits = capped(head(x).astype(jnp.float32), config.logit_cap)
        return logits if past is None else (logits, new)
