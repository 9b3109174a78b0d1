"""The Mosaic TPU kernel: run by the interpreter of JAX, exported for TPUs, and what surrounds it."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export, lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from samples import weights

import jaxquant as jq
from jaxquant.kernels import mosaic_tpu, reference, tuning
from jaxquant.kernels.matmul import chosen, quantized_matmul
from jaxquant.numerics.prepared import CHIPS
from jaxquant.numerics.spec import QuantSpec

MIB = 2**20
ROUNDED = jq.ActivationSpec()


def given(
    k, n, bits=4, group=None, symmetric=True, dtype="bfloat16", scale_dtype=None, chip="v5e", activations=None, lead=()
):
    """A prepared weight with every code, the extremes in its first rows, and scales that are no powers of two."""
    rng = np.random.default_rng(bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = rng.integers(low, high + 1, (*lead, k, n))
    codes[..., 0, :], codes[..., 1, :] = low, high
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric, activations=activations)
    shape = (*lead, spec.num_groups(k), n)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, shape) * 10.0 ** rng.integers(-2, 1, shape), scale_dtype or dtype)
    zero = None if symmetric else jnp.asarray(rng.integers(low, high + 1, shape), jnp.int8)
    q = jq.QTensor.from_codes(jnp.asarray(codes, jnp.int8), scale, zero, spec, dtype=dtype)
    return jq.prepare(q, "tpu", chip)


def tokens(m, k, dtype="bfloat16"):
    return jnp.asarray(weights(m, k, seed=2), dtype)


def rounded_rows(x):
    """The numbers that codes of 8 bits stand for, each row's in a symmetric range, with float32 and x's roundings."""
    rows = np.asarray(x, np.float32)
    scale = (np.abs(rows).max(-1, keepdims=True) * np.float32(2 / 255)).astype(x.dtype).astype(np.float32)
    codes = np.clip(np.round(rows * (np.float32(1) / scale)), -128, 127)
    return codes.astype(np.float64) * scale


def by_the_formula(x, q, pre_scaled=False):
    """x · s(c - z) in float64; `pre_scaled` rounds what the kernel multiplies with to bfloat16."""
    codes, scale = (np.asarray(a, np.float64) for a in (q.codes, q.scale))
    zero = np.zeros(scale.shape) if q.zero_point is None else np.asarray(q.zero_point, np.float64)
    scale, zero = (np.repeat(a, codes.shape[-2] // a.shape[-2], -2) for a in (scale, zero))
    w = scale * (codes - zero)
    if pre_scaled:
        w = w.astype(ml_dtypes.bfloat16).astype(np.float64)
    rows = np.asarray(x, np.float64) if q.spec.activations is None else rounded_rows(x)
    return rows @ w


def interpreted(x, q, dtype=jnp.float32):
    """The kernel's result, and what the detector of races printed; memory that nothing was written to holds NaNs."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        out = jax.block_until_ready(mosaic_tpu.kernel_matmul(x, q, dtype, params))
    return np.asarray(out, np.float64), printed.getvalue()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that cut small products in both directions and along K."""
    small = tuning.TpuTiles(tile_m=160, tile_n=256, tile_k=256), *tuning.TPU_TILES["v5e"]
    for chip in tuning.TPU_TILES:
        monkeypatch.setitem(tuning.TPU_TILES, chip, small)


CASES = {  # tokens, K, N, and what else of the weight
    "one token": (1, 512, 256, {"group": 128}),
    "odd tokens, a last tile that is not full": (19, 512, 384, {"group": 128, "chip": None}),
    "two tiles of tokens": (170, 256, 128, {"group": 128}),
    "scaled weights": (130, 512, 256, {"group": 128, "chip": "v6e", "symmetric": False}),
    "scaled int8 weights": (130, 256, 128, {"bits": 8, "group": 128, "chip": "tpu7x", "scale_dtype": "float32"}),
    "groups that fill the deep unit": (130, 512, 128, {"group": 256, "chip": "v6e"}),
    "int8": (5, 512, 256, {"bits": 8, "group": 256, "symmetric": False}),
    "per channel": (5, 512, 128, {"symmetric": False}),
    "int8 per channel": (17, 256, 256, {"bits": 8, "chip": "v4"}),
    "three bits": (5, 256, 128, {"bits": 3, "group": 128}),
    "zero points": (5, 512, 256, {"group": 128, "symmetric": False}),
    "float32": (5, 512, 256, {"group": 128, "dtype": "float32"}),
    "many tokens of float32": (130, 256, 128, {"group": 128, "dtype": "float32", "chip": "v6e"}),
    "rounded": (5, 512, 384, {"bits": 8, "activations": ROUNDED}),
    "rounded, zero points": (5, 512, 128, {"bits": 8, "activations": ROUNDED, "symmetric": False}),
    "rounded float32": (5, 256, 128, {"bits": 8, "dtype": "float32", "activations": ROUNDED}),
    "rounded, scaled weights": (130, 256, 128, {"group": 128, "chip": "v6e", "activations": ROUNDED}),
    "rounded, four bits in groups": (40, 512, 256, {"group": 128, "activations": ROUNDED, "symmetric": False}),
}  # fmt: skip


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_formula(case):
    m, k, n, weight = CASES[case]
    q, x = given(k, n, **weight), tokens(m, k, weight.get("dtype", "bfloat16"))
    assert mosaic_tpu.declines(x, q) is None
    found, printed = interpreted(x, q)
    want = by_the_formula(x, q, pre_scaled="scaled" in case)
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert "RACE" not in printed


def test_sums_of_integers_are_exact():
    """Sums of products of codes that float32 would round on the way."""
    rng = np.random.default_rng(0)
    a, c = rng.integers(100, 128, (2, 2048)), rng.integers(100, 128, (2048, 128))
    a[:, 0] = 127
    q = jq.QTensor.from_codes(
        jnp.asarray(c, jnp.int8), jnp.ones((1, 128)), None, QuantSpec(activations=ROUNDED), dtype="float32"
    )
    x = a.astype(np.float32)
    x[:, 0] = 127.5  # so that the scale is one; no code is larger than 127
    found, _ = interpreted(jnp.asarray(x), jq.prepare(q, "tpu", "v5e"))
    np.testing.assert_array_equal(found, (a @ c).astype(np.float32))


def test_rows_that_no_code_stands_for_are_nan():
    q, x = given(256, 128, bits=8, activations=ROUNDED), tokens(4, 256)
    x = x.at[1, 5].set(jnp.inf).at[2, 7].set(jnp.nan).at[3].set(0)
    found, _ = interpreted(x, q)
    assert np.isnan(found[1:3]).all()
    np.testing.assert_allclose(found[0], by_the_formula(x[:1], q)[0], rtol=0, atol=2e-6 * np.abs(found[0]).max())
    np.testing.assert_array_equal(found[3], 0)


def test_results_are_rounded_once_to_the_dtype_asked_for():
    q, x = given(256, 128, group=128), tokens(3, 256)
    found, _ = interpreted(x, q, jnp.bfloat16)
    want = by_the_formula(x, q).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(found, want)


def test_stacks_of_weights():
    q = given(256, 128, group=128, symmetric=False, lead=(2,))
    x = jnp.stack([tokens(4, 256), 2 * tokens(4, 256)])
    found, printed = interpreted(x, q)
    want = by_the_formula(x, q)
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert "RACE" not in printed


def test_channel_scales_divide_the_input():
    q, x = given(256, 128, group=128), tokens(3, 256)
    channels = jnp.asarray(np.exp2(np.random.default_rng(0).integers(-2, 3, (256, 1))), jnp.bfloat16)
    scaled = dataclasses.replace(q, channel_scale=channels)
    found, _ = interpreted(x * channels[:, 0], scaled)
    np.testing.assert_array_equal(found, interpreted(x, q)[0])


def exported(fn, *args, platform="tpu"):
    """Its program for a platform, made on this one."""
    return export.export(jax.jit(fn), platforms=[platform])(*args).mlir_module()


def kernels(program):
    return program.count("@tpu_custom_call")


@pytest.mark.parametrize("chip", [None, "v6e"])
@pytest.mark.parametrize("m", [1, 200])
def test_the_program_for_a_tpu_runs_the_kernel(m, chip):
    q, x = given(512, 256, group=128, symmetric=False, chip=chip), tokens(m, 512)
    assert chosen(x, q) == "mosaic_tpu"
    assert kernels(exported(quantized_matmul, x, q)) == 1
    assert kernels(exported(quantized_matmul, x, q, platform="cpu")) == 0
    layers = jax.tree.map(lambda a: jnp.stack([a, a]), given(512, 512, group=128, chip=chip))
    scanned = lambda x, layers: lax.scan(lambda x, q: (quantized_matmul(x, q), None), x, layers)[0]  # noqa: E731
    assert kernels(exported(scanned, x, layers)) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_programs_with_rounded_inputs(bits):
    q, x = given(256, 256, bits, activations=ROUNDED), tokens(3, 256)
    assert chosen(x, q) == "mosaic_tpu"
    assert kernels(exported(quantized_matmul, x, q)) == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_on_other_platforms_it_is_the_definition(symmetric):
    w = jnp.asarray(weights(256, 2, 64), jnp.bfloat16)
    q = jq.quantize(w, jq.int4(group_size=128, symmetric=symmetric), contract=(-3,), out=(-2, -1))
    x, seed = tokens(5, 256), jnp.asarray(weights(5, 2, 64), jnp.bfloat16)
    prepared = jq.prepare(q, "tpu", "v5e")
    assert chosen(x, prepared) == "mosaic_tpu"

    def results(q, run):
        out = lambda x: jnp.vdot(seed, run(x, q)).astype(jnp.float32)  # noqa: E731
        return run(x, q), jax.grad(out)(x), jax.jvp(out, (x,), (x,))[1]

    run = jax.jit(quantized_matmul)
    wanted = results(q, lambda x, q: reference.matmul(x, q, None, None))
    for found, want in zip(results(prepared, run), wanted, strict=True):
        assert found.dtype == want.dtype
        np.testing.assert_array_equal(found, want)


def test_the_derivative_for_a_tpu_is_that_of_the_dequantized_weight():
    """The gradient's program has no kernel: x · w needs none for it, and w is dequantized."""
    q, x = given(256, 128, group=128), tokens(3, 256, "float32")
    q = dataclasses.replace(q, dtype="float32")
    grad = jax.grad(lambda x: jnp.sum(quantized_matmul(x, q)))
    want = np.broadcast_to(np.asarray(jq.dequantize(q, jnp.float32), np.float64).sum(1), x.shape)
    np.testing.assert_allclose(grad(x), want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert kernels(exported(grad, x)) == 0


def at(i, tree):
    return jax.tree.map(lambda a: a[i], tree)


def test_vmap_of_tokens_and_of_weights():
    x = jnp.stack([tokens(4, 256), 2 * tokens(4, 256)])
    one = given(256, 128, group=128, symmetric=False)
    two = jax.tree.map(lambda a: jnp.stack([a, a]), one)
    for axes, args in (((0, None), (x, one)), ((0, 0), (x, two)), ((None, 0), (x[1], two))):
        run = jax.vmap(quantized_matmul, in_axes=axes)
        found = run(*args)
        for i in range(2):
            want = quantized_matmul(*(a if axis is None else at(i, a) for a, axis in zip(args, axes, strict=True)))
            np.testing.assert_array_equal(found[i], want)
        assert kernels(exported(run, *args)) == 1
        grads = jax.grad(lambda x, run=run, q=args[1]: jnp.sum(run(x, q).astype(jnp.float32)))(args[0])
        assert grads.shape == args[0].shape
    stacked = jnp.stack([x, 3 * x])  # more tokens for a stack of weights
    run = jax.vmap(quantized_matmul, in_axes=(0, None))
    np.testing.assert_array_equal(run(stacked, two)[1], quantized_matmul(3 * x, two))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inputs_split_over_a_mesh(check_vma):
    q, x = given(512, 128, group=128), tokens(3, 512)
    specs = dataclasses.replace(q, values=P("k"), scale=P("k"))

    def local(x, q):
        part = dataclasses.replace(q, in_shape=(256,))
        return lax.psum(quantized_matmul(x, part, preferred_element_type=jnp.float32), "k")

    mesh = jax.make_mesh((2,), ("k",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "k"), specs), out_specs=P(), check_vma=check_vma)
    want = reference.matmul(x, q, jnp.float32, None)
    np.testing.assert_allclose(jax.jit(run)(x, q), want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert kernels(exported(run, x, q)) == 1


def test_explicit_shardings_are_left_to_xla():
    q, x = given(256, 128, group=128), tokens(3, 256)
    mesh = jax.make_mesh((2,), ("n",), axis_types=(AxisType.Explicit,))
    split = [jax.device_put(a, jax.NamedSharding(mesh, P(None, "n"))) for a in (q.values, q.scale)]
    q = dataclasses.replace(q, values=split[0], scale=split[1])
    assert mosaic_tpu.declines(x, q) == "arrays are sharded explicitly, outside of `shard_map`"


@pytest.mark.parametrize("chip", [None, *CHIPS["tpu"]])
def test_tiles_fit_in_memory_and_cover_the_product(chip):
    limit = tuning.TPU_CHIPS[chip].memory
    for m, k, n in ((1, 4096, 4096), (16, 28672, 8192), (511, 14336, 4096 + 128), (8192, 4096, 14336)):
        for group, bits, rounded in ((128, 4, False), (512, 8, True)):
            tiles = tuning.tpu_tiles(chip, m, k, n, group, bits, rounded)
            assert k % tiles.tile_k == 0 == tiles.tile_k % group
            assert tiles.tile_m == m < 16 or tiles.tile_m % 16 == 0
            assert tiles.tile_n % 128 == 0
            assert tiles.memory <= limit
            least = tiles.tile_m * k * 2 + 2 * tiles.tile_k * tiles.tile_n * bits // 8 + 8 * tiles.tile_m * tiles.tile_n
            assert least < tiles.memory
    assert tuning.tpu_tiles(chip, 16, 2**22, 128, 2**21, 4, False) is None


@pytest.mark.parametrize("chip", CHIPS["tpu"])
def test_chips_are_what_jax_knows_of_them(chip):
    known = pltpu.get_tpu_info_for_chip(
        getattr(pltpu.ChipVersion, {"tpu7x": "TPU_7X"}.get(chip, f"TPU_{chip.upper()}")), 1
    )
    ours = tuning.TPU_CHIPS[chip]
    assert ours.memory == known.vmem_capacity_bytes * 3 // 4
    assert ours.depth == known.mxu_column_size
    assert ours.integers == (known.int8_ops_per_second > 0)


PLAIN = {"k": 256, "n": 128, "group": 128}
STATIC = jq.ActivationSpec(static=True)
DECLINED = {
    "plain layout": (3, PLAIN, None, "the weight is not prepared for a TPU"),
    "another platform": (3, PLAIN, "gpu", "the weight is not prepared for a TPU"),
    "rounded inputs, any chip": (3, {**PLAIN, "chip": None, "activations": ROUNDED}, "tpu", "a TPU of any generation"),
    "rounded inputs on v4": (3, {**PLAIN, "chip": "v4", "activations": ROUNDED}, "tpu", "prepared for v4, which"),
    "static ranges": (3, {**PLAIN, "activations": STATIC}, "tpu", "rounded otherwise"),
    "asymmetric ranges": (3, {**PLAIN, "activations": jq.ActivationSpec(symmetric=False)}, "tpu", "rounded otherwise"),
    "no tokens": (0, PLAIN, "tpu", "the result has no entries"),
    "outputs": (3, {**PLAIN, "n": 192}, "tpu", "192 outputs, no multiple of 128"),
    "groups": (3, {**PLAIN, "group": 64}, "tpu", "64 input channels share a scale, no multiple of 128"),
    "inputs": (3, {**PLAIN, "k": 96, "group": None}, "tpu", "96 input channels, no multiple of 128"),
    "float16": (3, {**PLAIN, "dtype": "float16"}, "tpu", "inputs are float16, not bfloat16 or float32"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_declined(name):
    m, weight, platform, reason = DECLINED[name]
    q, x = given(**weight), tokens(m, weight["k"], weight.get("dtype", "bfloat16"))
    if platform != "tpu":
        q = jq.prepare(q, platform)
    assert reason in mosaic_tpu.declines(x, q)
    assert chosen(x, q) != "mosaic_tpu"
    with pytest.raises(ValueError, match="implementation='mosaic_tpu' cannot run here"):
        quantized_matmul(x, q, implementation="mosaic_tpu")


def test_tensor_scales_and_double_scales_are_declined():
    q, x = given(**PLAIN), tokens(3, 256)
    tensor = jq.prepare(jq.quantize(jnp.ones((256, 128), jnp.bfloat16), jq.int8(granularity="per_tensor")), "tpu")
    assert mosaic_tpu.declines(x, tensor) == "all outputs share one scale"
    with jax.enable_x64(True):
        wide = dataclasses.replace(q, scale=q.scale.astype(jnp.float64))
        assert mosaic_tpu.declines(x, wide) == "scales are float64"
