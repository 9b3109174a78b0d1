"""GPTQ and AWQ checkpoints, against vectors that the upstream packers have made and decoders of their descriptions."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damaged import damage
from safetensors.numpy import load_file
from small_models import OPT, in_order_of_groups, quantized, random_model, random_qtensor

import jaxquant as jq
from jaxquant.checkpoints import awq, gptq, group_index
from jaxquant.checkpoints.gptq_config import V1, V2, read_config
from jaxquant.checkpoints.tensors import same_bits
from jaxquant.models.config import FAMILIES
from jaxquant.models.names import tensor_paths
from jaxquant.numerics.qtensor import is_qtensor

GOLDEN = json.loads((Path(__file__).with_name("data") / "gptq_awq_bnb_golden.json").read_text())
GPTQ_VECTORS = [name for name in GOLDEN if name.startswith("gptq")]
Q = "model.layers.0.self_attn.q_proj"
INT4 = jq.int4(group_size=32, scale_dtype="float16")
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)


float32 = jax.jit(functools.partial(jq.dequantize, dtype=jnp.float32))


def same_arrays(found, expected):
    return found.keys() == expected.keys() and all(same_bits(found[part], expected[part]) for part in expected)


def same_params(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(map(same_bits, *map(jax.tree.leaves, (a, b))))


def golden_weight(vectors):
    """The weight `[in, out]` that a golden file says its codes stand for."""
    codes, scales, zeros = (np.float64(vectors[f"{part}_out_by_{by}"])
                            for part, by in (("codes", "in"), ("scales", "group"), ("zeros", "group")))  # fmt: skip
    of_input = np.arange(codes.shape[1]) // vectors["group_size"]
    return ((codes - zeros[:, of_input]) * scales[:, of_input]).T


# GPTQ


@pytest.mark.parametrize("name", GPTQ_VECTORS)
def test_golden_gptq_files_both_ways(name):
    vectors = GOLDEN[name]
    scales = np.float16(vectors["scales_out_by_group"]).T
    arrays = {
        "qweight": np.array(vectors["qweight"]["data"], np.int32),
        "qzeros": np.array(vectors["qzeros_v1"]["data"], np.int32),
        "scales": np.ascontiguousarray(scales),
        "g_idx": np.arange(vectors["in_features"], dtype=np.int32) // vectors["group_size"],
    }
    spec = jq.QuantSpec(vectors["bits"], vectors["group_size"], symmetric=vectors["sym"])
    q = gptq.unpack(arrays, spec, V1, "float16")
    q.validate()
    np.testing.assert_array_equal(q.unsigned_codes, np.array(vectors["codes_out_by_in"]).T)
    np.testing.assert_array_equal(q.unsigned_zero_point, np.array(vectors["zeros_out_by_group"]).T)
    np.testing.assert_array_equal(float32(q), np.float32(golden_weight(vectors)))
    assert same_arrays(gptq.pack(q, V1), arrays)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [V1, V2])
@pytest.mark.parametrize(("group_size", "symmetric", "reordered"), [(None, True, False), (16, False, True)])
def test_gptq_arrays_hold_the_weight_and_come_back(bits, version, group_size, symmetric, reordered):
    q = random_qtensor((64, 32), jq.QuantSpec(bits, group_size, symmetric), "float16")
    q = in_order_of_groups(q) if reordered else q
    arrays = gptq.pack(q, version)
    shapes = {"qweight": (2 * bits, 32), "qzeros": (4 if group_size else 1, bits), "g_idx": (64,)}
    assert {part: arrays[part].shape for part in shapes} == shapes
    w = decoders.gptq(arrays, bits, 1 if version == V1 else 2)
    np.testing.assert_array_equal(float32(q).T, np.float32(w))
    again = gptq.unpack(arrays, q.spec, version, "float16")
    same_params(group_index.in_order_of_groups(again, arrays["g_idx"]) if reordered else again, q)


# AWQ


def test_golden_awq_file_both_ways():
    vectors = GOLDEN["awq_gemm_4bit"]
    arrays = {part: np.array(vectors[part]["data"], np.int32) for part in ("qweight", "qzeros")}
    arrays["scales"] = np.ascontiguousarray(np.float16(vectors["scales_out_by_group"]).T)
    q = awq.unpack(arrays, jq.int4(group_size=vectors["group_size"], symmetric=False), "float16")
    q.validate()
    np.testing.assert_array_equal(q.unsigned_codes, np.array(vectors["codes_out_by_in"]).T)
    np.testing.assert_array_equal(q.unsigned_zero_point, np.array(vectors["zeros_out_by_group"]).T)
    np.testing.assert_array_equal(float32(q), np.float32(golden_weight(vectors)))
    assert same_arrays(awq.pack(q), arrays)


def test_awq_arrays_hold_the_weight():
    q = random_qtensor((60, 40), jq.int4(group_size=20, symmetric=False), "float16")  # no multiples of 32
    np.testing.assert_array_equal(float32(q).T, np.float32(decoders.awq(awq.pack(q))))


# Whole models


def decoded(directory, model):
    """The weights `[out, in]` of the quantized modules of a directory, by an independent decoder."""
    storage = json.loads((directory / "config.json").read_text())["quantization_config"]
    parts: dict[str, dict] = {}
    for name, array in load_file(directory / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = array
    quantized = {f"{module}.weight": arrays for module, arrays in parts.items() if "qweight" in arrays}
    if storage["quant_method"] == "awq":
        return {name: decoders.awq(arrays) for name, arrays in quantized.items()}
    version = 1 if storage["checkpoint_format"] == "gptq" else 2
    return {name: decoders.gptq(arrays, storage["bits"], version) for name, arrays in quantized.items()}


def assert_holds(directory, model, qparams):
    """The files of a directory say what the quantized parameters do, weight by weight."""
    found = decoded(directory, model)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
              for path, leaf in jax.tree_util.tree_leaves_with_path(qparams, is_leaf=is_qtensor)}  # fmt: skip
    count = 0
    for name, path in tensor_paths(model.config).items():
        if is_qtensor(leaves[path]):
            layer = int(name.split(".")[2])
            w = float32(leaves[path])[layer].T
            np.testing.assert_array_equal(np.float32(found[name]), w)
            count += 1
    assert count == len(found) > 0


SPECS = {
    "gptq": INT4,
    "gptq, 8 bits per channel": jq.int8(scale_dtype="float16"),
    "gptq, asymmetric": jq.QuantSpec(3, 16, symmetric=False, scale_dtype="float16"),
    "awq": jq.int4(group_size=16, symmetric=False, scale_dtype="float16"),
    "awq, per channel": jq.int4(symmetric=False, scale_dtype="float16"),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_model_comes_back_code_for_code(tmp_path, case):
    model, qparams = random_model(SPECS[case])
    jq.save(tmp_path / "out", model, qparams, format=case.partition(",")[0])
    assert_holds(tmp_path / "out", model, qparams)
    again, read = jq.load_pretrained(tmp_path / "out")
    same_params(read, qparams)
    assert again.config == model.config
    assert again.dtype == "float32"


@pytest.mark.parametrize("format", ["gptq", "awq"])
@pytest.mark.parametrize("architecture", [a for a in FAMILIES if a != "GPT2LMHeadModel"])  # its weights lie otherwise
def test_every_family(tmp_path, architecture, format):
    own_words = {"config": OPT} if architecture == "OPTForCausalLM" else {}
    model, qparams = random_model(SPECS["awq"], architectures=[architecture],
                                  model_type=FAMILIES[architecture].fixed["model_type"], **own_words)  # fmt: skip
    jq.save(tmp_path / "out", model, qparams, format=format)
    same_params(jq.load_pretrained(tmp_path / "out")[1], qparams)


def test_act_order_is_read_and_computed_with_exactly(tmp_path):
    model, params = random_model(INT4)
    qparams = jax.tree.map(in_order_of_groups, params, is_leaf=is_qtensor)
    jq.save(tmp_path / "out", model, qparams, format="gptq")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert_holds(tmp_path / "out", model, qparams)
    _, read = jq.load_pretrained(tmp_path / "out")
    same_params(read, qparams)
    logits = model.apply(jq.dequantize_params(read), TOKENS)
    np.testing.assert_allclose(model.apply(read, TOKENS), logits, atol=1e-5 * np.abs(logits).max())
    unordered = jax.tree.map(
        lambda q: dataclasses.replace(q, input_order=None) if is_qtensor(q) else q, read, is_leaf=is_qtensor
    )
    assert np.abs(model.apply(unordered, TOKENS) - logits).max() > 1e-2 * np.abs(logits).max()
    jq.save(tmp_path / "native", model, read)  # keeps the order too
    same_params(jq.load_pretrained(tmp_path / "native")[1], read)
    jq.save(tmp_path / "group", model, read, format="compressed-tensors")
    grouped = jax.tree.leaves(jq.load_pretrained(tmp_path / "group")[1])  # its scales have the model's dtype
    assert all(np.array_equal(*pair) for pair in zip(grouped, jax.tree.leaves(read), strict=True))
    with pytest.raises(ValueError, match="its codes are not in the order of the inputs; use format='gptq'"):
        jq.save(tmp_path / "awq", model, read, format="awq")


def test_an_order_that_no_file_has_is_written_for_what_it_means(tmp_path):
    """Inputs of one group in another order than their own, and an order of inputs that share one scale anyway."""
    for i, spec in enumerate((INT4, SPECS["gptq, 8 bits per channel"])):
        model, params = random_model(spec)
        order = jnp.asarray(np.random.default_rng(0).permutation(64).astype(np.int32))[None, :, None]
        q = params["layers"]["mlp"]["up_proj"]["kernel"]
        q = dataclasses.replace(q, input_order=jnp.concatenate([order] * 2))
        params["layers"]["mlp"]["up_proj"]["kernel"] = q
        for format in ("gptq", "compressed-tensors"):
            jq.save(tmp_path / f"{format}{i}", model, params, format=format)
            _, read = jq.load_pretrained(tmp_path / f"{format}{i}")
            assert same_bits(float32(read["layers"]["mlp"]["up_proj"]["kernel"]), float32(q))


def test_several_specs_and_what_is_left_alone_are_rules(tmp_path):
    model, params = random_model()
    qparams = quantized(params, INT4, lambda path: "self_attn" in path and path.endswith("kernel"))
    qparams = quantized(qparams, SPECS["gptq, 8 bits per channel"], lambda path: path.endswith("up_proj/kernel"))
    qparams = quantized(qparams, SPECS["gptq, asymmetric"], lambda path: path == "lm_head/kernel")
    jq.save(tmp_path / "out", model, qparams, format="gptq")
    storage = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == storage
    assert {key: storage[key] for key in ("bits", "group_size", "sym", "lm_head", "checkpoint_format")} == {
        "bits": 4, "group_size": 32, "sym": True, "lm_head": True, "checkpoint_format": "gptq_v2"}  # fmt: skip
    assert storage["dynamic"] == {
        r"-:^model\.layers\.\d+\.mlp\.gate_proj$": {},
        r"+:^model\.layers\.\d+\.mlp\.up_proj$": {"bits": 8, "group_size": -1, "sym": True},
        r"-:^model\.layers\.\d+\.mlp\.down_proj$": {},
        "+:^lm_head$": {"bits": 3, "group_size": 16, "sym": False},
    }
    same_params(jq.load_pretrained(tmp_path / "out")[1], qparams)


def test_formats_are_converted_without_loss(tmp_path):
    model, qparams = random_model(jq.int4(group_size=32, symmetric=False), dtype="float16")
    formats = ["gptq", "compressed-tensors", "awq", "jaxquant", "awq", "gptq"]
    for i, format in enumerate(formats):
        jq.save(tmp_path / str(i), model, qparams, format=format)
        model, read = jq.load_pretrained(tmp_path / str(i))
        same_params(read, qparams)
        assert model.dtype == "float16"


def test_old_directories_have_a_configuration_of_their_own_and_biases_of_zeros(tmp_path):
    model, qparams = random_model(INT4)
    out = tmp_path / "out"
    jq.save(out, model, qparams, format="gptq")
    hf_config = json.loads((out / "config.json").read_text())
    del hf_config["quantization_config"]
    (out / "config.json").write_text(json.dumps(hf_config))
    damage(out, Q, bias=np.zeros(64, np.float16))
    damage(out, "model.layers.1.mlp.down_proj", bias=np.zeros(64, np.float16), g_idx=None)
    same_params(jq.load_pretrained(out)[1], qparams)
    jq.save(out, model, qparams, format="awq", overwrite=True)  # all of the old one is known, and goes
    assert not (out / "quantize_config.json").exists()
    jq.save(out, model, qparams, format="gptq", overwrite=True)
    damage(out, Q, bias=np.ones(64, np.float16))
    with pytest.raises(ValueError, match=r"q_proj.bias in the checkpoint but not in"):
        jq.load_pretrained(out)


REFUSED = {
    "gptq, 5 bits": ("gptq", jq.QuantSpec(5), "q_proj.*cannot be written as gptq: bits=5 is none of 2, 3, 4, 8, or"),
    "awq, 8 bits": ("awq", jq.int8(), "cannot be written as awq: bits=8 is none of 4, or format='jaxquant'"),
    "narrow range": ("gptq", jq.int8(narrow_range=True), "narrow_range has no place in the format"),
    "per tensor": ("awq", jq.QuantSpec(4, granularity="per_tensor"), "granularity per_tensor is not supported"),
    "inputs": ("gptq", jq.int8(activations=jq.ActivationSpec()), "rounded inputs have no place in the format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_say_is_refused_and_nothing_is_left(tmp_path, case):
    format, spec, message = REFUSED[case]
    model, qparams = random_model(spec)
    with pytest.raises(ValueError, match=message) as caught:
        jq.save(tmp_path / "out", model, qparams, format=format)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["gptq", "awq"])
@pytest.mark.parametrize("factor", [1 + 2**-20, 2.0**20, 2.0**-30])
def test_scales_that_float16_does_not_have_are_refused(tmp_path, format, factor):
    model, qparams = random_model(jq.int4(group_size=32))
    qparams["layers"]["mlp"]["up_proj"]["kernel"] = dataclasses.replace(
        q := qparams["layers"]["mlp"]["up_proj"]["kernel"], scale=q.scale * factor
    )
    with pytest.raises(ValueError, match=r"up_proj.weight: its float32 scales are no float16 .*scale_dtype='float16'"):
        jq.save(tmp_path / "out", model, qparams, format=format)


def test_shapes_and_modules_that_a_format_does_not_have(tmp_path):
    model, params = random_model(intermediate_size=40)
    for format, message in (("gptq", r"\[64, 40\].*multiples of 32"), ("awq", "nothing is quantized")):
        qparams = quantized(params, INT4, lambda path: path.endswith("up_proj/kernel")) if format == "gptq" else params
        with pytest.raises(ValueError, match=message):
            jq.save(tmp_path / "out", model, qparams, format=format)
    head = quantized(params, INT4, lambda path: path == "lm_head/kernel")
    with pytest.raises(ValueError, match="lm_head is quantized, which readers of awq do not expect"):
        jq.save(tmp_path / "out", model, head, format="awq")
    embedding = jq.quantize(params["embed_tokens"]["embedding"], INT4, contract=(-1,), out=(-2,))
    with pytest.raises(ValueError, match=r"embed_tokens.weight: only the weights of Linears are quantized there"):
        jq.save(tmp_path / "out", model, {**head, "embed_tokens": {"embedding": embedding}}, format="gptq")
    two = quantized(quantized(params, INT4, lambda p: p.endswith("q_proj/kernel")), SPECS["awq"],
                    lambda p: p.endswith("k_proj/kernel"))  # fmt: skip
    with pytest.raises(ValueError, match=r"groups of \[16, 32\], but the format has one group_size"):
        jq.save(tmp_path / "out", model, two, format="awq")


def test_codes_that_read_back_differently_are_an_error(tmp_path, monkeypatch):
    def wrong(q, version):
        arrays = original(q, version)
        arrays["qzeros"][0, 0] ^= 2
        return arrays

    original = gptq.pack
    monkeypatch.setattr(gptq, "pack", wrong)
    model, qparams = random_model(SPECS["awq"])
    with pytest.raises(OSError, match="reads back differently from what was written"):
        jq.save(tmp_path / "out", model, qparams, format="gptq")
    assert list(tmp_path.iterdir()) == []


# What is wrong on disk


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of each format; returns a function that copies one with changes and reads it."""
    root = tmp_path_factory.mktemp("written")
    for format in ("gptq", "awq"):
        jq.save(root / format, *random_model(SPECS[format]), format=format)

    def read(out, format, storage, **arrays):
        shutil.copytree(root / format, out)
        damage(out, Q, **arrays)
        hf_config = json.loads((out / "config.json").read_text())
        hf_config["quantization_config"] |= storage
        (out / "config.json").write_text(json.dumps(hf_config))
        return jq.load_pretrained(out)

    return read


def ints(*shape):
    return np.zeros(shape, np.int32)


G_IDX = np.arange(64, dtype=np.int32) // 32


@pytest.mark.parametrize(
    ("format", "arrays", "message"),
    [
        ("gptq", {"qweight": None}, "q_proj.weight missing from the checkpoint|tensor .*q_proj.*is int32"),
        ("gptq", {"qzeros": None}, "q_proj.qzeros is missing; download or write the checkpoint again"),
        ("gptq", {"scales": None}, "q_proj.scales is missing"),
        ("gptq", {"qweight": ints(8)}, r"qweight has shape \[8\], which are no codes of 4 bits"),
        ("gptq", {"qweight": ints(8, 40)}, r"\[8, 40\], which are no codes of 4 bits; inputs and outputs must be"),
        ("gptq", {"qweight": ints(0, 64)}, "which are no codes of 4 bits"),
        ("gptq", {"qweight": ints(12, 64)}, r"q_proj: group_size=32 does not divide|q_proj.g_idx is|q_proj.qzeros is"),
        ("gptq", {"qweight": ints(8, 64).astype(np.int64)}, r"qweight is int64\[8, 64\]; expected int32\[8, 64\]"),
        ("gptq", {"qzeros": ints(2, 9)}, r"q_proj.qzeros is int32\[2, 9\]; expected int32\[2, 8\]"),
        ("gptq", {"qzeros": ints(2, 8)}, "qzeros holds other zero points than 8, but the .* says sym=true"),
        ("gptq", {"scales": np.ones((2, 64))}, r"scales is float64\[2, 64\]; expected float32 or bfloat16 or float16"),
        ("gptq", {"scales": np.full((2, 64), np.nan, np.float16)}, "q_proj.scales holds what is no scale"),
        ("gptq", {"g_idx": ints(64)}, "q_proj.g_idx does not give each of 2 groups as many inputs"),
        ("gptq", {"g_idx": G_IDX + 1}, "q_proj.g_idx does not give each of 2 groups as many inputs"),
        ("gptq", {"g_idx": G_IDX - 1}, "q_proj.g_idx does not give each of 2 groups as many inputs"),
        ("gptq", {"g_idx": G_IDX * (2**31 - 1)}, "q_proj.g_idx does not give each of 2 groups as many inputs"),
        ("gptq", {"g_idx": G_IDX[::-1].copy()}, "a g_idx does not ascend, but the .* says desc_act=false"),
        ("gptq", {"g_idx": ints(63)}, r"g_idx is int32\[63\]; expected int32\[64\]"),
        ("gptq", {"weight": np.ones((64, 64), np.float32)}, "q_proj.weight is not supported beside GPTQ's codes"),
        ("awq", {"qzeros": None}, "q_proj.qzeros is missing"),
        ("awq", {"qweight": ints(64)}, r"qweight has shape \[64\]; expected two sizes"),
        ("awq", {"qweight": ints(60, 8)}, "q_proj: group_size=16 does not divide"),
        ("awq", {"qweight": ints(64, 9)}, r"q_proj.qzeros is int32\[4, 8\]; expected int32\[4, 9\]"),
        ("awq", {"scales": np.ones((4, 8), np.float16)}, r"scales is float16\[4, 8\]; expected .*\[4, 64\]"),
        ("awq", {"g_idx": ints(64)}, "q_proj.g_idx is not supported beside AWQ's codes"),
    ],
)
def test_damaged_tensors_are_one_clear_error(written, tmp_path, format, arrays, message):
    with pytest.raises(ValueError, match=message) as caught:
        written(tmp_path / "out", format, {}, **arrays)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("format", "storage", "message"),
    [
        ("gptq", {"bits": 5}, "quantization_config: bits=5 is not supported; supported: 2, 3, 4, 8"),
        ("gptq", {"bits": None}, "bits=None is not supported"),
        ("gptq", {"bits": 2}, r"qzeros is int32\[3, 8\]; expected int32\[6, 4\]"),
        ("gptq", {"group_size": 0}, "group_size=0 is not supported; expected a size, or -1 for none"),
        ("gptq", {"group_size": "32"}, "group_size='32' is not supported"),
        ("gptq", {"group_size": -1}, r"qzeros is int32\[3, 8\]; expected int32\[1, 8\]"),
        ("gptq", {"sym": "yes"}, "sym='yes' is not supported"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported"),
        ("gptq", {"pack_dtype": "int64"}, "pack_dtype='int64' is not supported"),
        ("gptq", {"surprise": 1}, "surprise=1 is not supported"),
        ("gptq", {"dynamic": [1]}, r"dynamic=\[1\] is not supported; expected an object"),
        ("gptq", {"dynamic": {"-:.*q_proj": {}}}, "'.*q_proj' leaves .*q_proj alone, but it is quantized"),
        ("gptq", {"dynamic": {"+:(": {}}}, "is no regular expression"),
        ("gptq", {"dynamic": {"(a+)+b": {}}}, "is too complex"),
        ("gptq", {"dynamic": {".*q_proj": {"adapter": 1}}}, "adapter=1 is not supported"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, "qzeros holds other zero points than 8"),
        ("awq", {"bits": 8}, "bits=8 is not supported"),
        ("awq", {"version": "gemv"}, "version='gemv' is not supported"),
        ("awq", {"group_size": 2.5}, "group_size=2.5 is not supported"),
        ("awq", {"zero_point": False}, "qzeros holds other zero points than 8, but the .* says zero_point=false"),
        ("awq", {"quant_method": "gptq"}, "zero_point=True is not supported"),
    ],
)
def test_a_configuration_that_is_not_understood_is_one_clear_error(written, tmp_path, format, storage, message):
    with pytest.raises(ValueError, match=message) as caught:
        written(tmp_path / "out", format, storage)
    assert "\n" not in str(caught.value)


def test_what_other_writers_say_is_understood():
    config = read_config({"bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": True, "static_groups": False,
                          "model_file_base_name": "model", "format": "gptq_v2", "quant_method": "gptq"})  # fmt: skip
    assert config.base == jq.int4(group_size=128)
    assert (config.version, config.act_order) == (V2, True)
