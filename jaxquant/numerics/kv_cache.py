"""Keys and values of the tokens that attention has seen, quantized but for the newest ones.

Values are rounded per token and head, keys either so or per channel over groups of tokens, because the outliers of keys
sit in a few channels (Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
arXiv:2402.02750). The newest tokens stay as they are in a ring, from which whole groups move to the quantized store
once they are old enough, so an array never changes its shape and a decoding loop compiles once. A cache of floats is
one whose ring holds everything.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """How a cache keeps keys and values.

    Attributes:
      bits: width of a code, 2 to 8; None keeps everything as it is.
      symmetric: as in `QuantSpec`.
      keys: which entries of a head's keys share a scale: those of one token (`per_token`), or those of one channel over
        `group_size` tokens (`per_channel`). Values are always rounded per token.
      group_size: tokens that share a scale of per_channel keys.
      residual: newest tokens that stay as they are, a multiple of `group_size` if keys are per_channel.

    Raises:
      ValueError: a field is outside its range.
    """

    bits: int | None = None
    symmetric: bool = False
    keys: Literal["per_token", "per_channel"] = "per_token"
    group_size: int = 32
    residual: int = 0

    def __post_init__(self):
        if self.keys not in ("per_token", "per_channel"):
            raise ValueError(f"keys={self.keys!r} of a cache are neither per_token nor per_channel")
        if type(self.group_size) is not int or self.group_size < 8 or self.group_size % 8:
            raise ValueError(f"group_size={self.group_size!r} tokens of a cache must be a multiple of 8; try 32")
        if type(self.residual) is not int or self.residual < 0 or self.residual % self.step:
            raise ValueError(
                f"residual={self.residual!r} tokens of a cache must be a multiple of {self.step}, 0 for none"
            )
        if self.bits is not None:
            _ = self.value_spec  # raises for the other fields

    @property
    def step(self) -> int:
        """Tokens that are rounded together."""
        return self.group_size if self.keys == "per_channel" else 1

    @property
    def value_spec(self) -> QuantSpec:
        """The codes of values, and of per_token keys."""
        assert self.bits is not None  # where nothing is rounded, nobody asks
        return QuantSpec(bits=self.bits, symmetric=self.symmetric, granularity="per_token")

    @property
    def key_spec(self) -> QuantSpec:
        """The codes of keys."""
        if self.keys == "per_token":
            return self.value_spec
        assert self.bits is not None
        return QuantSpec(bits=self.bits, symmetric=self.symmetric, group_size=self.group_size)

    def stored(self, length):
        """How many of `length` tokens, the oldest, are rounded: an int for an int, an array for an array."""
        old = (length - self.residual) // self.step * self.step
        return max(old, 0) if isinstance(old, int) else jnp.maximum(old, 0)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rounded", "recent_keys", "recent_values", "length"],
    meta_fields=["spec"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of one attention layer. A pytree; caches of several layers can be stacked.

    Attributes:
      rounded: keys and values of the oldest tokens, `[batch, tokens, kv_heads, head_dim]`; None if nothing is rounded.
      recent_keys, recent_values: float `[batch, ring, kv_heads, head_dim]`: token t lies at `t % ring`.
      length: int32 `[]`, tokens held.
      spec: static.
    """

    rounded: tuple[QTensor, QTensor] | None
    recent_keys: jax.Array
    recent_values: jax.Array
    length: jax.Array
    spec: CacheSpec

    @property
    def capacity(self) -> int:
        """Tokens that there is room for, or a few more."""
        return self.recent_keys.shape[-3] + (0 if self.rounded is None else self.rounded[0].shape[-3])

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def empty_cache(spec: CacheSpec, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype) -> KVCache:
    """A cache with room for at least `capacity` tokens in each of `batch` sequences; keys and values are `dtype`."""

    def zeros(tokens):
        return jnp.zeros((batch, tokens, kv_heads, head_dim), dtype)

    length = jnp.zeros((), jnp.int32)
    if spec.bits is None:
        return KVCache(None, zeros(capacity), zeros(capacity), length, spec)
    tokens = max(-(-(capacity - spec.residual) // spec.step), 1) * spec.step
    ring = zeros(spec.residual + spec.step)
    return KVCache(_rounded(zeros(tokens), zeros(tokens), spec), ring, ring, length, spec)


def fill(cache: KVCache, keys: jax.Array, values: jax.Array) -> KVCache:
    """Puts the first tokens, `[batch, time, kv_heads, head_dim]`, into an empty cache that has room for them."""
    spec, ring, time = cache.spec, cache.recent_keys.shape[1], keys.shape[1]
    old = 0
    if cache.rounded is not None and spec.stored(time):
        old = spec.stored(time)
        cache = _with_rounded(cache, keys[:, :old], values[:, :old], 0)
    slots = jnp.arange(old, time, dtype=jnp.int32) % ring
    return dataclasses.replace(
        cache,
        recent_keys=cache.recent_keys.at[:, slots].set(keys[:, old:]),
        recent_values=cache.recent_values.at[:, slots].set(values[:, old:]),
        length=jnp.full_like(cache.length, time),
    )


def append(cache: KVCache, key: jax.Array, value: jax.Array) -> KVCache:
    """Adds one token, `[batch, 1, kv_heads, head_dim]`; the cache must have room for it."""
    ring = cache.recent_keys.shape[1]
    put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=cache.length % ring, axis=1)
    cache = dataclasses.replace(
        cache,
        recent_keys=put(cache.recent_keys, key),
        recent_values=put(cache.recent_values, value),
        length=cache.length + 1,
    )
    return cache if cache.rounded is None else _move_oldest(cache)


def _move_oldest(cache: KVCache) -> KVCache:
    """Rounds the oldest group of the ring if the token that came last made it old enough.

    Without a branch, which would copy the store: too early, a group of the store is overwritten with itself.
    """
    spec, ring = cache.spec, cache.recent_keys.shape[1]
    at = spec.stored(cache.length - 1)
    due = spec.stored(cache.length) > at

    def oldest(recent):
        return lax.dynamic_slice_in_dim(recent, at % ring, spec.step, 1)

    return _with_rounded(cache, oldest(cache.recent_keys), oldest(cache.recent_values), at, due)


def read(cache: KVCache) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All keys and values, dequantized, in an order of their own.

    Returns:
      keys and values, `[batch, slots, kv_heads, head_dim]`, and the position of the token in each slot, int32
      `[slots]`; -1 marks an empty one.
    """
    ring = cache.recent_keys.shape[1]
    old = jnp.zeros_like(cache.length) if cache.rounded is None else cache.spec.stored(cache.length)
    slots = jnp.arange(ring, dtype=jnp.int32)
    recent = old + (slots - old) % ring
    positions = jnp.where(recent < cache.length, recent, -1)
    if cache.rounded is None:
        return cache.recent_keys, cache.recent_values, positions
    keys, values = map(dequantize, cache.rounded)
    tokens = jnp.arange(keys.shape[1], dtype=jnp.int32)
    return (
        jnp.concatenate([keys, cache.recent_keys], 1),
        jnp.concatenate([values, cache.recent_values], 1),
        jnp.concatenate([jnp.where(tokens < old, tokens, -1), positions]),
    )


def _rounded(keys: jax.Array, values: jax.Array, spec: CacheSpec) -> tuple[QTensor, QTensor]:
    axes = {"contract": (-1,), "out": ()} if spec.keys == "per_token" else {"contract": (-3,), "out": (-2, -1)}
    return quantize(keys, spec.key_spec, **axes), quantize(values, spec.value_spec, contract=(-1,), out=())


def _with_rounded(cache: KVCache, keys: jax.Array, values: jax.Array, at, due: bool | jax.Array = True) -> KVCache:
    """The cache with these tokens, rounded, from token `at` of its store on; as it was, if that is not due.

    Every array of a store has the tokens, or groups or bytes of them, along axis 1.
    """
    assert cache.rounded is not None
    tokens = cache.rounded[0].shape[1]

    def put(whole, piece):
        start = at * whole.shape[1] // tokens
        before = lax.dynamic_slice_in_dim(whole, start, piece.shape[1], 1)
        return lax.dynamic_update_slice_in_dim(whole, jnp.where(due, piece, before), start, 1)

    leaves, tree = jax.tree.flatten(cache.rounded)
    parts = jax.tree.leaves(_rounded(keys, values, cache.spec))
    return dataclasses.replace(cache, rounded=jax.tree.unflatten(tree, list(map(put, leaves, parts))))
