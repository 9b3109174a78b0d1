"""GPTQ against a float64 oracle, and what it promises where there is little or bad data."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from samples import correlated, output_error, statistics_of, weights

from jaxquant.methods import gptq as gptq_module
from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.batching import one_by_one_on_cpu
from jaxquant.numerics.spec import QuantSpec, int3, int4, int8


def asymmetric(spec):
    return dataclasses.replace(spec, symmetric=False)


ORACLE_CASES = {  # name: (config, inputs, dead channels)
    "4-bit group": (GPTQ(int4(group_size=16), block_size=16), 64, ()),
    "4-bit group, dynamic": (GPTQ(int4(group_size=16), act_order=False, block_size=32), 64, ()),
    "4-bit asymmetric group, dynamic": (GPTQ(asymmetric(int4(group_size=16)), act_order=False), 80, (3, 16, 40)),
    "4-bit asymmetric group": (GPTQ(asymmetric(int4(group_size=32))), 96, (0, 95)),
    "group wider than the block": (GPTQ(int4(group_size=48), block_size=16), 96, ()),
    "group wider than the block, dynamic": (GPTQ(int4(group_size=48), act_order=False, block_size=16), 144, (50,)),
    "group no multiple of the tile, dynamic": (GPTQ(int4(group_size=12), act_order=False, block_size=40), 108, ()),
    "inputs no multiple of the block": (GPTQ(int8(), block_size=32), 75, (7,)),
    "inputs no multiple of the block, in order": (GPTQ(asymmetric(int8()), act_order=False, block_size=24), 75, ()),
    "3-bit channel": (GPTQ(int3(), block_size=64), 130, tuple(range(20, 40))),
    "2-bit group, narrow, dynamic": (
        GPTQ(QuantSpec(bits=2, group_size=8, narrow_range=True), act_order=False, block_size=16),
        40,
        (),
    ),
    "8-bit narrow tensor": (GPTQ(QuantSpec(bits=8, granularity="per_tensor", narrow_range=True)), 60, ()),
    "5-bit asymmetric tensor, in order": (
        GPTQ(QuantSpec(bits=5, granularity="per_tensor", symmetric=False), act_order=False, block_size=1),
        33,
        (0,),
    ),
    "6-bit asymmetric group, bfloat16 scales": (
        GPTQ(QuantSpec(bits=6, group_size=25, symmetric=False, scale_dtype="bfloat16"), percdamp=0.1),
        150,
        (),
    ),
    "7-bit single-row groups, dynamic": (GPTQ(QuantSpec(bits=7, group_size=1), act_order=False, block_size=8), 20, ()),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ORACLE_CASES)
def test_codes_scales_and_zero_points_equal_the_oracle(name):
    config, k, dead = ORACLE_CASES[name]
    x = correlated(k, 4 * k, np.float64)
    x[:, list(dead)] = 0
    w, stats = weights(k, 24), statistics_of(x)
    q, info = jax.jit(config.quantize)(jnp.asarray(w), stats)
    q.validate()
    spec = config.spec
    codes, scale, zero = oracles.gptq(
        w,
        np.asarray(stats.gram),
        spec.bits,
        spec.symmetric,
        spec.granularity,
        spec.group_size,
        spec.narrow_range,
        config.act_order,
        config.percdamp,
        jnp.dtype(spec.scale_dtype or "float32"),
    )
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.scale.astype(jnp.float64), scale)
    if not spec.symmetric:
        np.testing.assert_array_equal(q.zero_point, zero)
    assert int(info["dead_channels"]) == len(dead)
    assert float(info["damping"]) == config.percdamp
    assert not info["escalated"]


@functools.partial(jax.jit, static_argnums=2)
def run(w, stats, config):
    return config.quantize(w, stats)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [GPTQ(int4(group_size=16)), GPTQ(asymmetric(int4(group_size=16)), act_order=False), GPTQ(int3(), block_size=32)],
)
def test_without_tokens_it_is_rounding_to_nearest(config, dtype):
    w = jnp.asarray(weights(80, 12)).astype(dtype)
    q, info = run(w, statistics_of(np.zeros((0, 80), np.float32)), config)
    nearest, _ = run(w, None, RTN(config.spec))
    assert jax.tree.structure(q) == jax.tree.structure(nearest)
    jax.tree.map(np.testing.assert_array_equal, q, nearest)
    assert int(info["dead_channels"]) == 80


def test_dead_channels_are_rounded_to_nearest_and_disturb_no_other():
    x, w, config = correlated(64, 256), weights(64, 12), GPTQ(int4())
    dead = np.arange(64) % 4 == 1
    x[:, dead] = 0
    q, info = run(w, statistics_of(x), config)
    nearest, _ = run(w, None, RTN(config.spec))
    np.testing.assert_array_equal(q.codes[dead], nearest.codes[dead])
    assert int(info["dead_channels"]) == dead.sum()
    changed = np.where(dead[:, None], -w, w)  # negated, so that the scales stay
    other, _ = run(changed, statistics_of(x), config)
    np.testing.assert_array_equal(q.codes[~dead], other.codes[~dead])


@pytest.mark.parametrize(
    ("config", "gain"),
    [
        (GPTQ(int3(group_size=32)), 0.75),
        (GPTQ(asymmetric(int4(group_size=32)), act_order=False), 0.85),
        (GPTQ(asymmetric(int4(group_size=32))), 0.75),
        (GPTQ(int4()), 0.75),
    ],
)
def test_output_error_in_float32(config, gain):
    """Well below rounding to nearest, and what float64 reaches: the codes may differ in ties only."""
    x, w = correlated(160, 320), weights(160, 32)
    stats = statistics_of(x)
    q, _ = run(w, stats, config)
    nearest, _ = run(w, None, RTN(config.spec))
    error = output_error(w, q, stats.gram)
    assert error < gain * output_error(w, nearest, stats.gram)
    spec = config.spec
    codes, scale, zero = oracles.gptq(
        w,
        np.asarray(stats.gram),
        spec.bits,
        spec.symmetric,
        spec.granularity,
        spec.group_size,
        act_order=config.act_order,
    )
    rows, columns = oracles.groups_of(w.shape, spec.granularity, spec.group_size)
    delta = (codes - zero[rows, columns]) * scale[rows, columns] - w
    best = np.sum(delta * (np.asarray(stats.gram, np.float64) @ delta))
    assert abs(error / best - 1) < 0.01


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    "spec",
    [int3(group_size=32), int3(), asymmetric(int3(group_size=32)), QuantSpec(bits=3, granularity="per_tensor")],
    ids=str,
)
def test_clipped_scales_bring_the_weights_closer(spec, act_order):
    x, w = correlated(160, 320), weights(160, 32)
    stats = statistics_of(x)
    extremes, _ = run(w, stats, GPTQ(spec, act_order=act_order))
    clipped, _ = run(w, stats, GPTQ(spec, act_order=act_order, clip="mse"))
    clipped.validate()
    assert np.all(clipped.scale <= extremes.scale) or not act_order  # else they are not those of the same weights
    assert output_error(w, clipped, stats.gram) < output_error(w, extremes, stats.gram)


def test_neither_block_size_nor_the_unit_of_the_inputs_matters():
    x, w = correlated(96, 400), weights(96, 16)
    results = [
        run(w, statistics_of(scale * x), GPTQ(int4(), block_size=block))[0].codes
        for block, scale in [(1, 1), (16, 1), (128, 1), (128, 1024)]
    ]
    for codes in results[1:]:
        assert np.mean(codes == results[0]) > 0.999  # in float32 a tie may flip


def test_a_singular_gram_matrix_is_damped_more():
    x, w = correlated(64, 8), weights(64, 16)
    stats, config = statistics_of(x), GPTQ(int4(), percdamp=0.0)
    q, info = run(w, stats, config)
    assert bool(info["escalated"])
    assert 0 < float(info["damping"]) < 1e-3
    nearest, _ = run(w, None, RTN(config.spec))
    assert output_error(w, q, stats.gram) < 0.5 * output_error(w, nearest, stats.gram)


def test_one_bad_gram_matrix_of_a_stack_falls_back_alone():
    x, w = np.stack([correlated(48, 200, seed=s) for s in range(3)]), weights(3, 48, 8)
    config, stats = GPTQ(int4(group_size=16), act_order=False), statistics_of(x)
    alone = [run(w[i], jax.tree.map(lambda a, i=i: a[i], stats), config) for i in range(3)]
    bad = dataclasses.replace(stats, gram=stats.gram.at[1, 5, 7].set(jnp.nan).at[1, 7, 5].set(jnp.nan))
    q, info = jax.jit(jax.vmap(config.quantize))(w, bad)
    nearest, _ = run(w[1], None, RTN(config.spec))
    np.testing.assert_array_equal(q.codes[1], nearest.codes)
    np.testing.assert_array_equal(info["damping"], np.float32([0.01, np.inf, 0.01]))
    np.testing.assert_array_equal(info["escalated"], [False, True, False])
    for i in (0, 2):
        assert np.mean(q.codes[i] == alone[i][0].codes) > 0.99


@pytest.mark.parametrize("act_order", [True, False])
def test_the_program_does_not_grow_with_the_matrix(act_order):
    def lines(k, n):
        w = jax.ShapeDtypeStruct((k, n), jnp.float32)
        stats = jax.eval_shape(lambda: statistics_of(np.zeros((1, k), np.float32)))
        return len(run.lower(w, stats, config).as_text().splitlines())

    config = GPTQ(asymmetric(int4(group_size=128)), act_order=act_order)
    assert lines(512, 384) == lines(2048, 384) == lines(512, 1536) < 2000


def control_flow(jaxpr):
    """The loops and branches of a program, and of all programs in it: the shapes of what they decide by."""
    found = collections.Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            found["while", eqn.params["cond_jaxpr"].out_avals[0].shape] += 1
        if eqn.primitive.name == "cond":
            found["cond", eqn.invars[0].aval.shape] += 1
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda a: hasattr(a, "eqns")):
            if hasattr(inner, "eqns"):
                found += control_flow(inner)
    return found


@pytest.mark.parametrize("act_order", [True, False])
def test_stacking_batches_no_loop_bound_and_no_branch(act_order):
    """Only the loop over dampings decides by all matrices of a stack, where a stack runs at once."""
    x, w = np.stack([correlated(32, 64)] * 3), weights(3, 32, 4)
    config = GPTQ(int4(group_size=16), act_order=act_order)
    solve = functools.partial(gptq_module._gptq, config)
    gram = statistics_of(x).gram
    one = control_flow(jax.make_jaxpr(solve)((4,), w[0], gram[0]))
    bits = (jnp.full(3, 4),)
    stack = control_flow(jax.make_jaxpr(jax.vmap(solve))(bits, w, gram))
    assert one["cond", ()] >= int(not act_order)
    one.subtract([("while", ())])
    one.update([("while", (3,))])
    assert stack == one
    at_once, in_turn = (jax.vmap(f)(bits, w, gram)[0] for f in (solve, one_by_one_on_cpu(solve)))
    assert np.mean(at_once.codes == in_turn.codes) > 0.98


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spec": 4}, "spec=4 is not a QuantSpec"),
        ({"spec": QuantSpec(granularity="per_token")}, "per_token is for activations"),
        ({"act_order": 1}, "act_order=1 must be True or False"),
        ({"clip": "max"}, "clip='max' is not one of mse, diagonal, output"),
        ({"refine": -1}, "refine=-1 must be a whole number of rounds"),
        ({"refine": 1, "spec": QuantSpec(granularity="per_tensor")}, "refine works on the scales of columns"),
        ({"percdamp": -0.1}, "percdamp=-0.1 must be a fraction"),
        ({"percdamp": float("nan")}, "percdamp=nan must be a fraction"),
        ({"block_size": 0}, "block_size=0 must be a positive whole number"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**{"spec": int4(), **fields})


def test_call_errors():
    w, stats = jnp.ones((48, 8)), statistics_of(correlated(48, 100))
    with pytest.raises(ValueError, match="GPTQ needs calibration statistics"):
        GPTQ(int4()).quantize(w, None)
    with pytest.raises(ValueError, match=r"got w\[32, 8\] and stats.gram\[48, 48\]"):
        GPTQ(int4()).quantize(w[:32], stats)
    with pytest.raises(ValueError, match=r"use jax.vmap for stacked weights"):
        GPTQ(int4()).quantize(w[None], stats)
    with pytest.raises(ValueError, match="group_size=32 does not divide the contracting dimension 48"):
        GPTQ(int4(group_size=32)).quantize(w, stats)
    with pytest.raises(TypeError, match="only floating arrays can be quantized, not int32"):
        GPTQ(int4()).quantize(w.astype(jnp.int32), stats)
