"""A decoder as one value: what it computes, in which dtype, and the configuration to write back to disk."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxquant.models.attention import Past
from jaxquant.models.config import FAMILIES, DecoderConfig, from_hf
from jaxquant.models.decoder import Decoder, Embeddings, Layers, window_sizes
from jaxquant.models.family import VALUES
from jaxquant.models.names import parameter_shapes
from jaxquant.models.stacking import layer_path
from jaxquant.numerics.kv_cache import CacheSpec, empty_cache
from jaxquant.transforms.fold import FoldPair
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.recipe import unscaled


@dataclasses.dataclass(frozen=True)
class Model:
    """A causal language model without its parameters; frozen and hashable. `Model.from_hf` makes one.

    Attributes:
      config: what is computed.
      dtype: the dtype of the computation, whatever the parameters are stored in.
      hf_config: the Hugging Face configuration it was made from, as JSON.
      stacked: whether the parameters of its layers are stacked; see `models.stacking`.
    """

    config: DecoderConfig
    dtype: np.dtype
    hf_config: str
    stacked: bool = True

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any], dtype: DTypeLike = "float32") -> "Model":
        """Returns the model that a config.json (as a dict) describes; raises ValueError as `config.from_hf` does."""
        return cls(from_hf(hf_config), jnp.dtype(dtype), json.dumps(hf_config, sort_keys=True))

    @property
    def apply(self) -> Callable[[Any, jax.Array], jax.Array]:
        """The pure function `apply(params, tokens) -> logits`; leaves of `params` may be arrays or QTensors.

        `tokens` are integers `[batch, time]`, logits float32 `[batch, time, vocab]`; a position sees itself and those
        before it. A compiled function cannot raise: a token outside of the vocabulary gives NaN, see `check_tokens`.
        Equal models have the very same function, so whatever was compiled for it is found again.
        """
        return _apply(self.config, self.dtype, self.stacked)

    @property
    def blocks(self) -> "Blocks":
        """The same function in pieces, for models that are handled a few (stacked) layers at a time."""
        return _blocks(self.config, self.dtype)

    @property
    def decode(self) -> Callable[[Any, jax.Array, Past], tuple[jax.Array, Past]]:
        """The pure function `decode(params, tokens, past) -> (logits, past)`, for generation.

        `tokens` `[batch, time]` follow a past: any number of them an empty one, else one. Logits, float32 `[batch,
        vocab]`, are those after the last. Otherwise as `apply`.
        """
        return _decode(self.config, self.dtype, self.stacked)

    def empty_past(self, spec: CacheSpec, start: jax.Array, capacity: int) -> Past:
        """The past of sequences of which nothing has been seen.

        Args:
          spec: how keys and values are kept.
          start: how many tokens were filled in before each sequence, int32 `[batch]`.
          capacity: the most tokens that a sequence, with those before it, will have.
        """
        layers, config = self.config.num_layers, self.config
        cache = empty_cache(spec, len(start), capacity, config.num_kv_heads, config.head_dim, self.dtype)
        past = Past(cache, jnp.asarray(start, jnp.int32))
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (layers, *a.shape)), past)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Returns random parameters, float32; if stacked, kernels of the layers are `[layers, in, out]`."""
        return Decoder(self.config, self.dtype, self.stacked).init(key, jnp.zeros((1, 1), jnp.int32))["params"]

    def recipe(self, config, *, foldable: bool = False) -> list[tuple[str, Any]]:
        """Returns the rules that give every linear layer `config` and leave everything else alone.

        That is embeddings, the output head, routers, norms and biases. A rule stands there only if the model has what
        it is about: a rule that matches nothing is an error.

        Args:
          config: a method config.
          foldable: a weight whose channel scale could not be folded away (see `fold`) gets what `config` is without
            one. Formats without a place for such scales need this.
        """
        decoder = self.config
        head = [] if decoder.tie_embeddings else [("lm_head/kernel", None)]
        biased = decoder.qkv_bias or decoder.o_bias or decoder.mlp_bias or decoder.layer_norms
        biases = [(".*/bias", None)] if biased else []
        rest = [("embed_.*/embedding", None), *head, (".*norm/scale", None), *biases]
        return rest + self.layer_rules(config, foldable=foldable)

    def layer_rules(self, config, *, foldable: bool = False) -> list[tuple[str, Any]]:
        """Returns the rules of `recipe` that are about linear layers."""
        routers = [("layers/(.*/)?mlp/gate/kernel", None)] if self.config.num_experts else []
        rules = [("layers/.*/kernel", config)]
        if foldable and hasattr(config, "channel_scale"):
            paths = parameter_shapes(self.config, self.stacked)
            kernels = [path for path in paths if re.fullmatch("layers/.*/kernel", path)]
            foldable_ones = self._foldable(paths)
            rules = [(path, unscaled(config)) for path in kernels if path not in foldable_ones] + rules
        return routers + rules

    def _foldable(self, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
        """The readers of all fold pairs, but experts that read one norm and would each want another scale of it."""
        found = set()
        for pair in self.fold_pairs:
            lead = {len(shapes[path]) - (2 if path.endswith("kernel") else 1) for path in pair.sources}
            found |= {path for path in pair.readers if len(shapes[path]) - 2 in lead}
        return found

    @property
    def fold_pairs(self) -> tuple[FoldPair, ...]:
        """What makes the inputs of the linear layers, for `jaxquant.fold`.

        The values that `o_proj` reads come from fewer heads than it has where query heads share them: there, no scale
        can be moved.
        """
        shared = self.config.num_heads != self.config.num_kv_heads
        paths = parameter_shapes(self.config).keys()
        pairs = [pair for pair in FAMILIES[self.config.architecture].fold_pairs if not (shared and pair == VALUES)]
        pairs = [pair.among(paths) for pair in pairs if not paths.isdisjoint(pair.readers)]
        if self.stacked:
            return tuple(pairs)
        return tuple(_of_layer(pair, layer) for layer in range(self.config.num_layers) for pair in pairs)

    def check_tokens(self, tokens) -> None:
        """Raises ValueError, naming the first one, if a token is outside the vocabulary, or if they are no integers.

        Reads the values of `tokens` (integers of any shape), so it is called outside of `jit`.
        """
        tokens = np.asarray(tokens)
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens have dtype {tokens.dtype}; token ids are integers")
        outside = np.argwhere((tokens < 0) | (tokens >= self.config.vocab_size))
        if len(outside):
            position = tuple(outside[0].tolist())
            raise ValueError(
                f"token {tokens[position]} at position {list(position)} is outside the vocabulary: ids are 0 to "
                f"{self.config.vocab_size - 1}"
            )


def _of_layer(pair: FoldPair, layer: int) -> FoldPair:
    sources, readers = (tuple(layer_path(path, layer) for path in paths) for paths in (pair.sources, pair.readers))
    return FoldPair(sources, readers, pair.offset)


class Blocks(NamedTuple):
    """A model's layers one after the other.

    Attributes:
      embed: `embed(params, tokens) -> x`: the input `[batch, time, hidden]` of the first layer, from the parameters
        of the model (only those whose name begins with "embed" are needed) and tokens `[batch, time]`.
      apply: `apply(params, x) -> x`: what some layers make of their input. `params` holds `layers`, as the parameters
        of the model do but only of these layers, and their `windows`, of `windows`.
      windows: int32 `[layers]`, how many positions each layer sees.
    """

    embed: Callable[[Any, jax.Array], jax.Array]
    apply: Callable[[Any, jax.Array], jax.Array]
    windows: jax.Array


@functools.lru_cache(maxsize=32)
def _blocks(config: DecoderConfig, dtype: np.dtype) -> Blocks:
    layers = Layers(config, dtype)

    @jax.jit
    def embed(params, tokens):
        rows, _ = params["embed_tokens"]["embedding"].shape
        return Embeddings(dataclasses.replace(config, vocab_size=rows), dtype).apply({"params": params}, tokens)

    @jax.jit
    def apply(params, x):
        return layers.apply({"params": {"layers": params["layers"]}}, x, params["windows"])

    return Blocks(embed, quantized(apply), window_sizes(config))


@functools.lru_cache(maxsize=32)
def _apply(config: DecoderConfig, dtype: np.dtype, stacked: bool) -> Callable[[Any, jax.Array], jax.Array]:
    decoder = Decoder(config, dtype, stacked)

    @jax.jit  # without it, every call from Python would trace and compile the scan over the layers again
    def apply(params, tokens):
        return decoder.apply({"params": params}, _no_negative(tokens, config))

    return quantized(apply)


@functools.lru_cache(maxsize=32)
def _decode(config: DecoderConfig, dtype: np.dtype, stacked: bool) -> Callable[..., tuple[jax.Array, Past]]:
    decoder = Decoder(config, dtype, stacked)

    @jax.jit
    def decode(params, tokens, past):
        return decoder.apply({"params": params}, _no_negative(tokens, config), past)

    return quantized(decode)


def _no_negative(tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    """Negative tokens are outside of the vocabulary; a lookup would count them from its end."""
    return jnp.where(tokens < 0, config.vocab_size, tokens)
