"""Weights re-laid for the kernels of a platform are the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same, quantize_case
from functions import CASES

import jaxquant as jq
from jaxquant.kernels.matmul import quantized_matmul
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import QuantSpec, int4, int8
from jaxquant.transforms.quantized import quantized

LAYOUTS = {  # shape, contract, out
    "stack": ((2, 64, 24), (-2,), (-1,)),
    "heads": ((64, 4, 6), (-3,), (-2, -1)),
    "embedding": ((24, 64), (-1,), (-2,)),
    "output projection": ((4, 16, 24), (-3, -2), (-1,)),
}


def quantized_weight(layout, bits, **fields):
    shape, contract, out = LAYOUTS[layout]
    w = jax.random.normal(jax.random.key(0), shape)
    return jq.quantize(w, QuantSpec(bits=bits, group_size=32, **fields), contract=contract, out=out)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_stay(layout, bits, platform):
    q = quantized_weight(layout, bits, symmetric=bits % 2 == 0)
    prepared = jq.prepare({"w": q}, platform)["w"]
    prepared.validate()
    assert prepared.shape == q.shape
    np.testing.assert_array_equal(prepared.codes, q.codes)
    np.testing.assert_array_equal(jq.dequantize(prepared), jq.dequantize(q))
    back = jq.prepare(prepared, None)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, back, q)


def test_layouts_by_hand():
    codes = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (64, 3)), jnp.int8)
    q = jq.QTensor.from_codes(codes, jnp.ones((1, 3)), None, int4(), dtype="float32")
    by_platform = {p: np.asarray(jq.prepare(q, p).values) for p in ("cpu", "gpu", "tpu")}
    np.testing.assert_array_equal(by_platform["tpu"].astype(int), codes)
    assert by_platform["tpu"].dtype == jnp.int4
    gpu = by_platform["gpu"].view(np.uint8)
    np.testing.assert_array_equal(gpu, (codes[0::2] & 15 | codes[1::2] << 4).T.view(jnp.uint8))
    cpu = by_platform["cpu"].view(np.uint8)
    for n, run, i in ((0, 0, 0), (1, 1, 5), (2, 1, 15)):
        byte = cpu[n, run * 16 + i]
        low, high = (int(c) & 15 for c in (codes[run * 32 + i, n], codes[run * 32 + 16 + i, n]))
        assert byte == low | high << 4
    wide = jq.prepare(dataclasses.replace(q, values=codes, spec=int8()), "cpu")
    np.testing.assert_array_equal(wide.values, codes.T)


def test_inputs_that_are_no_whole_runs_stay_as_they_are():
    q = jq.quantize(jnp.ones((40, 8)), int4())
    assert jq.prepare(q, "cpu").prepared is None
    assert jq.prepare(q, "tpu").prepared is not None
    assert jq.prepare(q, "gpu").prepared is not None
    assert jq.prepare(jq.quantize(jnp.ones((41, 8)), int4()), "gpu").prepared is None
    assert jq.prepare(jq.quantize(jnp.ones((40, 8)), int8()), "cpu").prepared is not None


@pytest.mark.parametrize("name", CASES)
def test_functions_run_with_prepared_weights(name):
    case = CASES[name]
    qparams, _ = quantize_case(case, int4(group_size=case.group, symmetric=False))
    x = case.batches()[0]
    prepared = jq.prepare(qparams, "gpu")
    weights = [a for a in jax.tree.leaves(prepared, is_leaf=is_qtensor) if is_qtensor(a)]
    assert all(q.contract_last or q.in_shape[0] % 2 for q in weights)
    atol = 1e-2 if name == "cast_to_bf16" else 2e-5  # it is not the dequantized weights that are rounded
    assert_same(quantized(case.apply)(prepared, x), quantized(case.apply)(qparams, x), atol)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_files_are_the_same_for_every_platform(tmp_path, platform):
    q = {"w": quantized_weight("stack", 4)}
    jq.save(tmp_path / "tree", None, jq.prepare(q, platform))
    back = jq.load(tmp_path / "tree")
    assert jax.tree.structure(back) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, back, q)


@pytest.mark.parametrize(
    ("platform", "chip", "message"),
    [
        ("cuda", None, "platform='cuda' is not one of cpu, gpu, tpu"),
        ("tpu", "v3", r"chip='v3' is no tpu that is known by name \(v4, v5e, v5p, v6e, tpu7x\)"),
        ("cpu", "h100", r"chip='h100' is no cpu that is known by name \(none\)"),
    ],
)
def test_an_unknown_platform_is_refused(platform, chip, message):
    with pytest.raises(ValueError, match=message):
        jq.prepare({}, platform, chip)


@pytest.mark.parametrize(
    ("bits", "activations", "name", "message"),
    [
        (8, None, "int8", "int8: the inputs are not rounded; .*; reference: can run"),
        (8, None, "fast", "implementation='fast' is not one of"),
        (8, None, "mixed", "mixed: no outliers are kept"),
    ],
)
def test_an_implementation_that_declines_says_why(bits, activations, name, message):
    q = jq.quantize(jnp.ones((32, 8)), QuantSpec(bits=bits, activations=activations))
    with pytest.raises(ValueError, match=message):
        quantized_matmul(jnp.ones((2, 32)), q, implementation=name)
