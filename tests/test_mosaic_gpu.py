"""The Mosaic GPU kernel: run by the interpreter of JAX, exported for CUDA, and what surrounds it."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export, lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from samples import weights

import jaxquant as jq
from jaxquant.kernels import mosaic_gpu, reference, tuning
from jaxquant.kernels.matmul import chosen, quantized_matmul
from jaxquant.kernels.mosaic_gpu_schedule import Schedule, schedule_of
from jaxquant.numerics.spec import QuantSpec

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < mosaic_gpu.OLDEST_JAX, reason=f"the kernel needs a newer JAX than {jax.__version__}"
)


def small_chip(monkeypatch, split):
    """Three processors with two stages each."""
    monkeypatch.setitem(tuning.GPU_CHIPS, "h200", tuning.GpuChip(3, 232_448, 184.0))
    changed = {"stages": 2, "split": split}
    rows = [(most, dataclasses.replace(tiles, **changed)) for most, tiles in tuning.GPU_TILES["h200"]]
    monkeypatch.setitem(tuning.GPU_TILES, "h200", rows)


def given(k, n, bits=4, group=None, symmetric=True, dtype="bfloat16", scale_dtype=None, chip="h200"):
    """A prepared weight with every code, the extremes in its first rows, and scales that are no powers of two."""
    rng = np.random.default_rng(bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = rng.integers(low, high + 1, (k, n))
    codes[0], codes[1] = low, high
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric)
    shape = (spec.num_groups(k), n)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, shape) * 10.0 ** rng.integers(-2, 1, shape), scale_dtype or dtype)
    zero = None if symmetric else jnp.asarray(rng.integers(low, high + 1, shape), jnp.int8)
    q = jq.QTensor.from_codes(jnp.asarray(codes, jnp.int8), scale, zero, spec, dtype=dtype)
    return jq.prepare(q, "gpu", chip)


def tokens(m, k, dtype="bfloat16"):
    return jnp.asarray(weights(m, k, seed=2), dtype)


def by_the_formula(x, q, rounded):
    """x · s(c - z) in float64; `rounded` rounds what the kernel multiplies with to the dtype of x."""
    codes, scale = (np.asarray(a, np.float64) for a in (q.codes, q.scale))
    zero = 0.0 if q.zero_point is None else np.asarray(q.zero_point, np.float64)
    scale, shift = (np.repeat(a, len(codes) // len(q.scale), 0) for a in (scale, scale * zero))
    w = codes * scale
    if rounded:
        w = w.astype(ml_dtypes.bfloat16 if x.dtype == jnp.bfloat16 else np.float16).astype(np.float64)
    return np.asarray(x, np.float64) @ (w - shift)


def interpreted(x, q, dtype=jnp.float32):
    """The kernel's result, and what the detector of races printed; memory that nothing was written to holds NaNs."""
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        out = mosaic_gpu.kernel_matmul(x, q, dtype, params)
        jax.block_until_ready(out)
    return np.asarray(out, np.float64), printed.getvalue()


CASES = {  # tokens, K, N, whether tiles are split, and what else of the weight
    "one token": (1, 512, 256, True, {"group": 128}),
    "one token, whole tiles": (1, 512, 256, False, {"group": 128}),
    "odd tokens, tiles of one and of two processors": (13, 512, 512, True, {"group": 128}),
    "scaled weights": (70, 512, 256, True, {"group": 128}),
    "scaled weights, two tiles of tokens": (130, 512, 256, True, {"group": 128}),
    "int8": (5, 512, 256, True, {"bits": 8, "group": 256}),
    "int8, scaled weights": (64, 256, 256, True, {"bits": 8, "group": 128}),
    "per channel": (5, 512, 128, True, {}),
    "int8 per channel": (17, 512, 256, True, {"bits": 8}),
    "short groups": (5, 256, 256, True, {"group": 64}),
    "groups of one and a half steps": (5, 384, 256, True, {"group": 192}),
    "three bits": (5, 256, 256, True, {"bits": 3, "group": 128}),
    "zero points": (5, 512, 256, True, {"group": 128, "symmetric": False}),
    "zero points, scaled weights": (33, 512, 128, False, {"bits": 8, "group": 128, "symmetric": False}),
    "float16": (5, 512, 256, True, {"group": 128, "dtype": "float16"}),
    "float16, scaled weights": (64, 256, 128, True, {"group": 128, "dtype": "float16"}),
    "float32 scales, scaled weights": (64, 256, 128, False, {"group": 128, "scale_dtype": "float32"}),
}


@needs_mosaic
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_formula(case, monkeypatch):
    m, k, n, split, weight = CASES[case]
    small_chip(monkeypatch, split)
    q = given(k, n, **weight)
    x = tokens(m, k, weight.get("dtype", "bfloat16"))
    assert mosaic_gpu.declines(x, q) is None
    found, printed = interpreted(x, q)
    want = by_the_formula(x, q, rounded="scaled weights" in case)
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6 * np.abs(want).max())
    assert "RACE" not in printed


@needs_mosaic
@pytest.mark.parametrize("split", [False, True])
def test_results_are_rounded_once_to_the_dtype_asked_for(split, monkeypatch):
    small_chip(monkeypatch, split)
    q, x = given(512, 256, group=128), tokens(3, 512)
    found, _ = interpreted(x, q, jnp.bfloat16)
    want = by_the_formula(x, q, rounded=False)
    np.testing.assert_array_equal(found, want.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("tiles", "steps", "processors"), [(1, 1, 4), (3, 5, 4), (32, 32, 132), (7, 16, 3), (5, 2, 1)])
def test_every_step_is_done_once(tiles, steps, processors, split):
    schedule = Schedule(tiles, steps, processors, split)
    done = {}
    for processor in range(processors):
        count, part = schedule.runs(processor)
        runs = [tuple(int(v) for v in part(i)) for i in range(int(count))]
        assert sum(high - low for _, low, high, _ in runs) <= schedule.share
        for tile, low, high, index in runs:
            for step in range(low, high):
                assert (tile, step) not in done
                done[tile, step] = index
    assert sorted(done) == [(tile, step) for tile in range(tiles) for step in range(steps)]
    for tile in range(tiles):
        assert {done[tile, step] for step in range(steps)} == set(range(schedule.sharers[tile]))


@pytest.mark.parametrize(
    ("m", "k", "n", "shared"),
    [
        (16, 4096, 4096, True),  # 32 tiles on 132 processors
        (16, 8192, 28672, True),  # 224 tiles: whole ones would keep all processors busy twice, and some idle
        (128, 14336, 4096, True),
        (512, 8192, 28672, False),  # 896 tiles, and sums that are long to add
    ],
)
def test_tiles_are_shared_where_processors_would_be_idle(m, k, n, shared):
    tiles, chip = tuning.gpu_tiles("h200", m, n), tuning.GPU_CHIPS["h200"]
    found = schedule_of(m, k, n, 4, tiles, chip)
    assert found.split == shared
    assert dataclasses.replace(found, split=True).share <= dataclasses.replace(found, split=False).share


def exported(fn, *args, platform="cuda"):
    """Its program for a platform, made on this one."""
    check = export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    return export.export(jax.jit(fn), platforms=[platform], disabled_checks=[check])(*args).mlir_module()


@needs_mosaic
@pytest.mark.parametrize("m", [1, 100])
def test_the_program_for_a_gpu_runs_the_kernel(m):
    q, x = given(512, 256, group=128, symmetric=False), tokens(m, 512)
    assert chosen(x, q) == "mosaic_gpu"
    assert exported(quantized_matmul, x, q).count("@mosaic_gpu_v2") == 1
    assert "@mosaic_gpu_v2" not in exported(quantized_matmul, x, q, platform="cpu")
    layers = jax.tree.map(lambda a: jnp.stack([a, a]), given(512, 512, group=128))
    scanned = lambda x, layers: lax.scan(lambda x, q: (quantized_matmul(x, q), None), x, layers)[0]  # noqa: E731
    assert exported(scanned, x, layers).count("@mosaic_gpu_v2") == 1


@needs_mosaic
@pytest.mark.parametrize("symmetric", [True, False])
def test_on_other_platforms_it_is_the_definition(symmetric):
    w = jnp.asarray(weights(256, 2, 64), jnp.bfloat16)
    spec = jq.int4(group_size=128, symmetric=symmetric)
    q = jq.quantize(w, spec, contract=(-3,), out=(-2, -1))
    x, seed = tokens(5, 256), jnp.asarray(weights(5, 2, 64), jnp.bfloat16)
    prepared = jq.prepare(q, "gpu", "h100")
    assert chosen(x, prepared) == "mosaic_gpu"

    def results(q, run):
        out = lambda x: jnp.vdot(seed, run(x, q)).astype(jnp.float32)  # noqa: E731
        return run(x, q), jax.grad(out)(x), jax.jvp(out, (x,), (x,))[1]

    run = jax.jit(quantized_matmul)
    for found, want in zip(
        results(prepared, run), results(q, lambda x, q: reference.matmul(x, q, None, None)), strict=True
    ):
        assert found.dtype == want.dtype
        np.testing.assert_array_equal(found, want)
    assert quantized_matmul(x, prepared, preferred_element_type=jnp.float32).dtype == jnp.float32


@needs_mosaic
def test_channel_scales_divide_the_input(monkeypatch):
    small_chip(monkeypatch, split=False)
    q, x = given(256, 128, group=128), tokens(3, 256)
    channels = jnp.asarray(np.exp2(np.random.default_rng(0).integers(-2, 3, (256, 1))), jnp.bfloat16)
    scaled = dataclasses.replace(q, channel_scale=channels)
    found, _ = interpreted(x * channels[:, 0], scaled)
    np.testing.assert_array_equal(found, interpreted(x, q)[0])


def at(i, tree):
    return jax.tree.map(lambda a: a[i], tree)


@needs_mosaic
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
        assert exported(run, *args).count("@mosaic_gpu_v2") == 1
        grads = jax.grad(lambda x, run=run, q=args[1]: jnp.sum(run(x, q).astype(jnp.float32)))(args[0])
        assert grads.shape == args[0].shape
    many = jnp.broadcast_to(x[:1], (300, *x.shape[1:]))  # more tokens together than the kernel takes
    assert "@mosaic_gpu_v2" not in exported(jax.vmap(quantized_matmul, in_axes=(0, None)), many, one)


@needs_mosaic
@pytest.mark.parametrize("check_vma", [True, False])
def test_inputs_split_over_a_mesh(check_vma):
    q, x = given(512, 128, group=128), tokens(3, 512)
    specs = dataclasses.replace(q, values=P(None, "k"), scale=P("k"))

    def local(x, q):
        part = dataclasses.replace(q, in_shape=(256,))
        return lax.psum(quantized_matmul(x, part, preferred_element_type=jnp.float32), "k")

    mesh = jax.make_mesh((2,), ("k",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "k"), specs), out_specs=P(), check_vma=check_vma)
    want = reference.matmul(x, q, jnp.float32, None)
    np.testing.assert_allclose(jax.jit(run)(x, q), want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert exported(run, x, q).count("@mosaic_gpu_v2") == 1


@needs_mosaic
def test_explicit_shardings_are_left_to_xla():
    q, x = given(256, 128, group=128), tokens(3, 256)
    mesh = jax.make_mesh((2,), ("n",), axis_types=(AxisType.Explicit,))
    split = [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in ((q.values, P("n")), (q.scale, P(None, "n")))]
    q = dataclasses.replace(q, values=split[0], scale=split[1])
    assert mosaic_gpu.declines(x, q) == "arrays are sharded explicitly, outside of `shard_map`"


PLAIN = {"k": 256, "n": 128, "group": 128}
DECLINED = {
    "plain layout": (3, {**PLAIN, "chip": None}, {"prepared": None}, "not prepared for one of h100, h200"),
    "any GPU": (3, {**PLAIN, "chip": None}, {}, "not prepared for one of h100, h200"),
    "rounded inputs": (3, PLAIN, {"activations": jq.ActivationSpec()}, "the inputs are rounded"),
    "many tokens": (1025, PLAIN, {}, "1025 tokens are so many that it pays to dequantize"),
    "no tokens": (0, PLAIN, {}, "the result is 0 × 128, and there are no tiles for it"),
    "outputs": (3, {**PLAIN, "n": 192}, {}, "the result is 3 × 192, and there are no tiles for it"),
    "groups": (3, {**PLAIN, "group": 32}, {}, "32 input channels share a scale, no multiple of 64"),
    "inputs": (3, {**PLAIN, "k": 96, "group": None}, {}, "96 input channels share a scale, no multiple of 64"),
    "float32": (3, {**PLAIN, "dtype": "float32"}, {}, "inputs are float32, not bfloat16 or float16"),
}


@needs_mosaic
@pytest.mark.parametrize("name", DECLINED)
def test_what_is_declined(name):
    m, weight, changes, reason = DECLINED[name]
    q, x = given(**weight), tokens(m, weight["k"], weight.get("dtype", "bfloat16"))
    if "prepared" in changes:
        q = jq.prepare(q, None)
    q = dataclasses.replace(q, spec=dataclasses.replace(q.spec, activations=changes.get("activations")))
    assert reason in mosaic_gpu.declines(x, q)
    assert chosen(x, q) != "mosaic_gpu"
    with pytest.raises(ValueError, match="implementation='mosaic_gpu' cannot run here"):
        quantized_matmul(x, q, implementation="mosaic_gpu")


@needs_mosaic
def test_leading_axes_tensor_scales_and_double_scales_are_declined():
    q, x = given(**PLAIN), tokens(3, 256)
    stack = jax.tree.map(lambda a: a[None], q)
    assert mosaic_gpu.declines(x[None], stack) == "there are leading axes"
    tensor = jq.prepare(
        jq.quantize(jnp.ones((256, 128), jnp.bfloat16), jq.int8(granularity="per_tensor")), "gpu", "h100"
    )
    assert mosaic_gpu.declines(x, tensor) == "all outputs share one scale"
    with jax.enable_x64(True):
        wide = dataclasses.replace(q, scale=q.scale.astype(jnp.float64))
        assert mosaic_gpu.declines(x, wide) == "scales are float64"


@needs_mosaic
def test_the_benchmark_runs_and_stores_its_rows(tmp_path):
    """On a CPU, where every product is the definition; on a GPU the same command times the kernels."""
    sizes = ["--shapes", "256x128", "--tokens", "2", "1100", "--checked", "3", "--rotate", "1000", "--rounds", "1"]
    script = Path(__file__).parents[1] / "benchmarks" / "device_gpu.py"
    command = [sys.executable, "-W", "error", script, "--smoke", *sizes, "--out", tmp_path]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True)
    stored = json.loads((tmp_path / "device_gpu.json").read_text())
    assert (tmp_path / "device_gpu.png").stat().st_size > 10_000
    assert len(stored["checks"]) == 12
    assert {row["M"] for row in stored["rows"]} == {2, 1100}
    assert all(row["µs"] > 0 and row["roofline µs"] > 0 and row["error"] < 0.03 for row in stored["rows"])
    runs = {(row["product"], row["M"]): row["runs"] for row in stored["rows"] if row["runs"]}
    assert runs["W4 g128, jaxquant", 2] == "mosaic_gpu"
    assert runs["W8A8, jaxquant", 2] == "int8"
    assert runs["W4 g128, jaxquant", 1100] != "mosaic_gpu"


def test_an_old_jax_is_declined(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "OLDEST_JAX", (99, 1))
    q, x = given(**PLAIN), tokens(3, 256)
    assert mosaic_gpu.declines(x, q) == f"JAX {jax.__version__} is older than 99.1"
    assert quantized_matmul(x, q).shape == (3, 128)
