"""The cache of keys and values against a list of float64 arrays that is rounded by the textbook."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics.kv_cache import CacheSpec, append, empty_cache, fill, read

BATCH, HEADS, DIM = 2, 3, 16


def rounded(x, bits, symmetric, axis):
    """x with the numbers along `axis` rounded in one range, in float64."""
    low, high = np.minimum(x.min(axis, keepdims=True), 0), np.maximum(x.max(axis, keepdims=True), 0)
    steps = 2**bits - 1
    if symmetric:
        scale = np.maximum(high, -low) * (2 / steps)
        return np.clip(np.round(x * (1 / scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    scale = (high - low) / steps
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, steps) - zero) * scale


def expected(keys, values, spec):
    old = max(len(keys[0]) - spec.residual, 0) // spec.step * spec.step
    for at in range(0, old, spec.step):
        group = slice(at, at + spec.step)
        axis = 1 if spec.keys == "per_channel" else -1
        keys[:, group] = rounded(keys[:, group], spec.bits, spec.symmetric, axis)
        values[:, group] = rounded(values[:, group], spec.bits, spec.symmetric, -1)
    return keys, values


def in_order(cache):
    keys, values, positions = read(cache)
    order = np.argsort(positions, stable=True)[np.sum(np.asarray(positions) < 0) :]
    np.testing.assert_array_equal(positions[order], np.arange(cache.length))
    return np.asarray(keys[:, order]), np.asarray(values[:, order])


def tokens(count):
    rng = np.random.default_rng(count)
    return [rng.normal(size=(BATCH, count, HEADS, DIM)).astype(np.float64) for _ in range(2)]


SPECS = {
    "float": CacheSpec(),
    "int8": CacheSpec(8),
    "int8 symmetric": CacheSpec(8, symmetric=True),
    "int4": CacheSpec(4),
    "int4 residual": CacheSpec(4, residual=5),
    "int4 per channel": CacheSpec(4, keys="per_channel", group_size=8),
    "int3 per channel, residual": CacheSpec(3, keys="per_channel", group_size=8, residual=16),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("first", [1, 21])
def test_holds_every_token_rounded_once_it_is_old(name, first):
    spec, total = SPECS[name], 45
    with jax.enable_x64(True):
        keys, values = tokens(total)
        cache = empty_cache(spec, BATCH, total, HEADS, DIM, jnp.float64)
        shapes = jax.tree.map(jnp.shape, cache)
        cache = fill(cache, jnp.asarray(keys[:, :first]), jnp.asarray(values[:, :first]))
        check(cache, keys[:, :first], values[:, :first], spec)
        rest = [jnp.moveaxis(jnp.asarray(x[:, first:, None]), 1, 0) for x in (keys, values)]

        def several(cache, rest):
            return jax.lax.scan(lambda cache, token: (append(cache, *token), None), cache, rest)[0]

        cache = jax.jit(several)(cache, rest)
        check(cache, keys, values, spec)
        assert jax.tree.map(jnp.shape, cache) == shapes


def check(cache, keys, values, spec):
    if spec.bits is not None:
        keys, values = expected(keys.copy(), values.copy(), spec)
    found = in_order(cache)
    np.testing.assert_allclose(found[0], keys, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[1], values, rtol=0, atol=1e-12)


def test_bytes():
    made = functools.partial(empty_cache, batch=2, capacity=512, kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
    floats = made(CacheSpec())
    assert floats.nbytes == 2 * 2 * 512 * 2 * 64 * 2 + 4
    int8, int4 = made(CacheSpec(8)), made(CacheSpec(4))
    heads = 2 * 2 * 512 * 2  # keys and values
    assert int8.nbytes - int8.recent_keys.nbytes * 2 - 4 == heads * (64 + 2 + 1)
    assert int4.nbytes - int4.recent_keys.nbytes * 2 - 4 == heads * (32 + 2 + 1)


def test_outliers_in_a_channel_of_keys_want_scales_per_channel():
    keys, values = (x.astype(np.float32) for x in tokens(64))
    keys[..., 3] *= 50

    def error(spec):
        cache = fill(empty_cache(spec, BATCH, 64, HEADS, DIM, jnp.float32), jnp.asarray(keys), jnp.asarray(values))
        found = in_order(cache)[0]
        return np.abs(found - keys)[..., np.arange(DIM) != 3].mean()

    assert error(CacheSpec(4, keys="per_channel")) < error(CacheSpec(4)) / 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 9}, "bits=9 is not supported"),
        ({"bits": 8, "keys": "per_head"}, "keys='per_head'"),
        ({"bits": 8, "group_size": 12}, "group_size=12"),
        ({"bits": 8, "residual": -1}, "residual=-1"),
        ({"bits": 8, "keys": "per_channel", "residual": 20}, "residual=20 tokens of a cache must be a multiple of 32"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        CacheSpec(**fields)
