"""bitsandbytes' LLM.int8() checkpoints, against a vector that the package has made and a decoder of the description."""

import dataclasses
import json
from pathlib import Path

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damaged import damage
from safetensors.numpy import load_file
from small_models import random_array, random_model

import jaxquant as jq
from jaxquant.checkpoints import bitsandbytes
from jaxquant.checkpoints.tensors import same_bits

GOLDEN = json.loads((Path(__file__).with_name("data") / "gptq_awq_bnb_golden.json").read_text())["bnb_int8"]
Q = "model.layers.0.self_attn.q_proj"
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
METHOD = jq.LLMInt8(2.0, jq.int8(narrow_range=True), outliers=0)


def same_params(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(map(same_bits, *map(jax.tree.leaves, (a, b))))


def test_golden_file_both_ways():
    codes = np.array(GOLDEN["weight"]["data"], np.int8)
    largest = np.array(GOLDEN["SCB"]["data"], np.float32)
    spec = jq.int8(narrow_range=True, activations=jq.ActivationSpec())
    q = bitsandbytes.unpack(codes, largest, spec, "float32")
    q.validate()
    w = np.float32(GOLDEN["weight_fp16_as_f32"])
    np.testing.assert_allclose(jq.dequantize(q).T, w, atol=0.51 * largest.max() / 127)
    np.testing.assert_allclose(jq.dequantize(q).T, decoders.bitsandbytes({"weight": codes, "SCB": largest}), rtol=2e-7)
    again = bitsandbytes.pack(q)
    assert same_bits(again["weight"], codes)
    assert same_bits(again["SCB"], largest)
    ours = jq.quantize(jnp.asarray(w.T), dataclasses.replace(spec, scale_dtype="float32"))
    assert same_bits(ours.scale, q.scale)
    np.testing.assert_array_equal(ours.codes, q.codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_scale_that_is_chosen_for_a_weight_can_be_written(dtype):
    """A scale is the largest size of a row times 1 / 127, rounded to its dtype."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20_000)) * 3, dtype)
    q = jq.quantize(w, jq.int8(narrow_range=True, activations=jq.ActivationSpec()))
    largest = bitsandbytes.pack(q)["SCB"]
    np.testing.assert_array_equal(largest * np.float32(1 / 127), np.float32(q.scale[0]))


def test_scales_without_a_largest_size_are_refused(tmp_path, llm_int8):
    """Between those of two neighbouring sizes there may be a number that is none's."""
    sizes = np.float32(100) + np.arange(1000, dtype=np.float32) * np.float32(2**-17)
    scales = sizes * np.float32(1 / 127)
    (gaps,) = np.nonzero(np.nextafter(scales[:-1], np.float32(2)) < scales[1:])
    missing = np.nextafter(scales[gaps[0]], np.float32(2))
    model, changed = with_up_proj(llm_int8, scale=jnp.full((2, 1, 96), missing))
    with pytest.raises(ValueError, match=r"up_proj.weight: its float32 scales are no float32 numbers over 127"):
        jq.save(tmp_path / "out", model, changed, format="bitsandbytes")


def with_up_proj(llm_int8, **fields):
    """The model with another up_proj."""
    model, qparams = llm_int8
    layers = qparams["layers"]
    q = dataclasses.replace(layers["mlp"]["up_proj"]["kernel"], **fields)
    return model, {**qparams, "layers": {**layers, "mlp": {**layers["mlp"], "up_proj": {"kernel": q}}}}


@pytest.fixture(scope="module")
def llm_int8():
    return random_model(METHOD.spec)


def test_a_model_comes_back_and_computes_the_same(tmp_path, llm_int8):
    model, qparams = llm_int8
    jq.save(tmp_path / "out", model, qparams, format="bitsandbytes")
    storage = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert storage["llm_int8_threshold"] == 2.0
    assert storage["llm_int8_skip_modules"] == ["lm_head"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layouts = {name.removeprefix(f"{Q}."): (a.dtype.name, a.shape) for name, a in stored.items() if name.startswith(Q)}
    assert layouts == {"weight": ("int8", (64, 64)), "SCB": ("float32", (64,)), "weight_format": ("uint8", ())}
    kernel = qparams["layers"]["self_attn"]["q_proj"]["kernel"]
    w = decoders.bitsandbytes({part: stored[f"{Q}.{part}"] for part in ("weight", "SCB")})
    np.testing.assert_allclose(jq.dequantize(kernel)[0].T, w, rtol=2e-7)
    again, read = jq.load_pretrained(tmp_path / "out")
    same_params(read, qparams)
    np.testing.assert_array_equal(again.apply(read, TOKENS), model.apply(qparams, TOKENS))


def test_outliers_meet_dequantized_codes_and_other_inputs_are_rounded():
    """As the package computes: no float weights, and rows are scaled without the outliers. float64, from the paper."""
    w, x = np.float64(random_array((64, 8), seed=1)), np.float64(random_array((5, 64), seed=2)) * 4
    x[1, 3], x[4, 7] = 9.0, -7.0
    spec = dataclasses.replace(METHOD.spec, activations=jq.ActivationSpec(outlier_threshold=6.0))
    q = bitsandbytes.unpack(*np_int8(w), spec, "float32")
    y = jq.quantized(lambda p, x: x @ p)(q, jnp.asarray(x, jnp.float32))
    dense, outside = np.float64(jq.dequantize(q)), (np.abs(x) >= 6).any(0)
    inside = np.where(outside, 0, x)
    step = np.abs(inside).max(1, keepdims=True) / 127.5
    expected = np.round(inside / step).clip(-128, 127) * step @ dense + x[:, outside] @ dense[outside]
    extreme = np.abs(inside).argmax(1)  # lies between two codes, and may take the other one
    np.testing.assert_array_less(np.abs(y - expected), 1e-6 + 1.01 * step * np.abs(dense[extreme]))
    assert (np.abs(x @ dense - expected) > 1.01 * step * np.abs(dense[extreme])).any()


def np_int8(w):
    largest = np.abs(w).max(0)
    return np.round(w / largest * 127).astype(np.int8).T.copy(), largest.astype(np.float32)


def test_without_a_threshold(tmp_path):
    spec = jq.int8(narrow_range=True, scale_dtype="float32", activations=jq.ActivationSpec())
    model, qparams = random_model(spec, dtype="bfloat16")
    jq.save(tmp_path / "out", model, qparams, format="bitsandbytes")
    again, read = jq.load_pretrained(tmp_path / "out")
    same_params(read, qparams)
    assert again.dtype == "bfloat16"


INPUTS = jq.ActivationSpec(outlier_threshold=6.0)
REFUSED = {
    "4 bits": (jq.int4(), "symmetric 8-bit codes with a scale for each output"),
    "groups": (jq.int8(group_size=32), "symmetric 8-bit codes with a scale for each output"),
    "full range": (jq.int8(), "its codes reach from -127 to 127; quantize with narrow_range=True"),
    "weights only": (jq.int8(narrow_range=True), "round inputs to 8 bits for each token; quantize by LLMInt8"),
    "static": (jq.int8(narrow_range=True, activations=jq.ActivationSpec(static=True)), "round inputs to 8 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_cannot_say_is_refused(tmp_path, case):
    spec, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"cannot be written as bitsandbytes: .*{message}"):
        bitsandbytes.check_spec(spec)


def test_float_weights_of_outliers_and_several_thresholds_are_refused(tmp_path, llm_int8):
    rows = {"outlier_weight": jnp.zeros((2, 1, 96))}
    model, kept = with_up_proj(llm_int8, outlier_index=jnp.zeros((2, 1, 1), jnp.int32), **rows)
    with pytest.raises(ValueError, match=r"up_proj.weight: it keeps float weights of outliers; .*outliers=0"):
        jq.save(tmp_path / "out", model, kept, format="bitsandbytes")
    _, other = with_up_proj(llm_int8, spec=dataclasses.replace(METHOD.spec, activations=INPUTS))
    with pytest.raises(ValueError, match=r"thresholds of \[2.0, 6.0\]"):
        jq.save(tmp_path / "out", model, other, format="bitsandbytes")
    _, none = with_up_proj(llm_int8, outlier_index=jnp.full((2, 1, 1), 64, jnp.int32), **rows)  # a row of no channel
    jq.save(tmp_path / "out", model, none, format="bitsandbytes")


@pytest.mark.parametrize(
    ("storage", "arrays", "message"),
    [
        ({"load_in_4bit": True}, {}, "load_in_4bit=True is not supported"),
        ({"load_in_8bit": False}, {}, "load_in_8bit=False is not supported"),
        ({"llm_int8_has_fp16_weight": True}, {}, "llm_int8_has_fp16_weight=True is not supported"),
        ({"llm_int8_threshold": -1}, {}, "llm_int8_threshold=-1 is not supported; expected a size"),
        ({"llm_int8_threshold": None}, {}, "llm_int8_threshold=None is not supported"),
        ({}, {"SCB": None}, "q_proj.weight is int8; expected one of float32"),
        ({}, {"SCB": np.ones(63, np.float32)}, r"q_proj.weight is int8\[64, 64\]; expected int8\[63, 64\]"),
        ({}, {"SCB": np.ones((64, 1), np.float32)}, r"SCB has shape \[64, 1\]; expected one number for each output"),
        ({}, {"SCB": np.full(64, np.inf, np.float32)}, "q_proj.SCB holds what is no scale"),
        ({}, {"SCB": np.ones(64, np.float16)}, r"SCB is float16\[64\]; expected float32\[64\]"),
        ({}, {"weight": None}, "q_proj.weight is missing"),
        ({}, {"weight": np.ones((64, 64), np.float32)}, r"weight is float32\[64, 64\]; expected int8"),
        ({}, {"weight": np.ones((64, 64, 1), np.int8)}, r"weight is int8\[64, 64, 1\]; expected int8\[64, 64\]"),
        ({}, {"weight": np.full((64, 64), -128, np.int8)}, "weight has a code of -128, and the smallest is -127"),
        ({}, {"weight_format": np.array(1, np.uint8)}, "weight_format is not 0"),
        ({}, {"qzeros": np.ones(64, np.float32)}, "q_proj.qzeros is not supported beside bitsandbytes' codes"),
    ],
)
def test_what_is_wrong_on_disk_is_one_clear_error(tmp_path, llm_int8, storage, arrays, message):
    out = tmp_path / "out"
    jq.save(out, *llm_int8, format="bitsandbytes")
    damage(out, Q, **arrays)
    hf_config = json.loads((out / "config.json").read_text())
    hf_config["quantization_config"] |= storage
    (out / "config.json").write_text(json.dumps(hf_config))
    with pytest.raises(ValueError, match=message) as caught:
        jq.load_pretrained(out)
    assert "\n" not in str(caught.value)
