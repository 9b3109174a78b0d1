"""Learned rounding: it lowers what a block's output is off by, or changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal

from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.affine import quantize
from jaxquant.numerics.spec import ActivationSpec, QuantSpec, int4, int8
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.dequantize import dequantize_params
from jaxquant.transforms.quantize import quantize_params
from jaxquant.transforms.training.reconstruct import reconstruct


def block(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"] * params["gain"]


BLOCKS = [{"up": normal(32, 64, seed=i), "down": normal(64, 32, seed=i + 9), "gain": jnp.ones(32)} for i in range(2)]
INPUTS = normal(5, 64, 32, seed=1) * 3


def quantized_blocks(config):
    stats = calibrate(block, BLOCKS[0], list(INPUTS))
    return [quantize_params(b, stats if config.needs_statistics else None, config)[0] for b in BLOCKS]


def output(blocks, x):
    for b in blocks:
        x = block(dequantize_params(b), x)
    return x


def off_by(blocks):
    held_out = INPUTS[-1]
    return float(jnp.mean((output(blocks, held_out) - output(BLOCKS, held_out)) ** 2))


@pytest.mark.parametrize(
    ("config", "share"),
    [(RTN(QuantSpec(bits=2, group_size=16, symmetric=False)), 0.5), (GPTQ(QuantSpec(bits=3)), 0.9)],
)
def test_the_error_falls_whatever_it_starts_from(config, share):
    given = quantized_blocks(config)
    learned, errors = reconstruct(block, BLOCKS, given, INPUTS, steps=120, rate=1e-2)
    assert off_by(learned) < share * off_by(given)
    np.testing.assert_allclose(errors[-1].after, off_by(learned), rtol=1e-3)
    for old, new in zip(given, learned, strict=True):
        new["up"].validate()
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, old)
        assert not np.array_equal(new["up"].codes, old["up"].codes)
        assert int(jnp.max(jnp.abs(new["up"].codes - old["up"].codes))) == 1


def test_no_step_and_a_wild_one_change_nothing():
    given = quantized_blocks(RTN(int4()))
    for options in ({"steps": 1, "rate": 0.0}, {"steps": 3, "rate": 9.0}):
        learned, errors = reconstruct(block, BLOCKS, given, INPUTS, **options)
        jax.tree.map(np.testing.assert_array_equal, learned, given)
        assert all(e.after >= e.before for e in errors)


def test_what_it_cannot_learn_is_refused():
    given = quantized_blocks(RTN(int4()))
    with pytest.raises(ValueError, match="2 blocks and 1 quantized ones"):
        reconstruct(block, BLOCKS, given[:1], INPUTS)
    with pytest.raises(ValueError, match=r"inputs\[1, 64, 32\] are one batch"):
        reconstruct(block, BLOCKS, given, INPUTS[:1])
    rounded = [quantize_params(b, None, RTN(int8(activations=ActivationSpec())))[0] for b in BLOCKS]
    with pytest.raises(ValueError, match="'down' has rounded inputs; train it"):
        reconstruct(block, BLOCKS, rounded, INPUTS)
    order = jnp.arange(32, dtype=jnp.int32)[::-1, None]
    reordered = [b | {"up": dataclasses.replace(b["up"], input_order=order)} for b in given]
    with pytest.raises(ValueError, match="'up' has input_order; learn its rounding before that"):
        reconstruct(block, BLOCKS, reordered, INPUTS)
    with pytest.raises(ValueError, match=r"'up' is quantized with shape \[32, 64\], and in float it is \[64, 64\]"):
        reconstruct(block, [b | {"up": normal(64, 64)} for b in BLOCKS], given, INPUTS)
    with pytest.raises(ValueError, match="steps=0 must be a whole number, 1 or more"):
        reconstruct(block, BLOCKS, given, INPUTS, steps=0)


def signed_descent(w, q, x, steps, rate):
    """The paper's steps in float64 NumPy, for one linear block: the codes and scales that they end with."""
    low, high, size = q.spec.min_code, q.spec.max_code, q.scale.shape[0]
    by_group = lambda a: np.asarray(a, np.float64).reshape(size, -1, w.shape[1])  # noqa: E731
    codes, scale = by_group(q.codes), by_group(q.scale)
    v, a = np.clip(by_group(w) / scale - codes, -0.49, 0.49), np.ones_like(scale)
    for t in range(steps):
        batch, step = x[t % (len(x) - 1)], rate * (1 - t / steps)
        moved = codes + np.clip(v, -1, 1)
        rounded, factor = np.clip(np.round(moved), low, high), np.clip(a, 0.5, 1.5)
        off = batch @ ((rounded * factor * scale).reshape(w.shape) - w)
        gradient = by_group(batch.T @ off)
        passes = (moved >= low - 0.5) & (moved <= high + 0.5) & (np.abs(v) <= 1)
        v = v - step * np.sign(gradient * passes)
        a = a - step * np.sign(np.sum(gradient * rounded * scale, 1, keepdims=True))
    codes = np.clip(np.round(codes + np.clip(v, -1, 1)), low, high)
    return codes.reshape(w.shape), (scale * np.clip(a, 0.5, 1.5))[:, 0]


def test_steps_are_the_papers(float64):
    w, x = (np.asarray(a, np.float64) for a in (normal(16, 6), normal(4, 64, 4, seed=2) @ normal(4, 16)))
    q = quantize(jnp.asarray(w), QuantSpec(bits=3, group_size=8))
    linear, blocks = lambda p, x: x @ p["w"], ([{"w": jnp.asarray(w)}], [{"w": q}])
    (learned,), (error,) = reconstruct(linear, *blocks, jnp.asarray(x), steps=60, rate=3.1e-3)
    assert error.after < error.before
    codes, scale = signed_descent(w, q, x, 60, 3.1e-3)
    assert np.any(codes != np.asarray(q.codes))
    np.testing.assert_array_equal(learned["w"].codes, codes)
    np.testing.assert_allclose(learned["w"].scale, scale, rtol=1e-7)  # the size of a step is float32
