"""compressed-tensors' pack-quantized, against files of the upstream package and the package itself."""

import copy
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from damaged import damage
from safetensors.numpy import load_file
from small_models import in_order_of_groups

from jaxquant.checkpoints import pack_quantized
from jaxquant.checkpoints.compressed_tensors import CompressedTensors, write_compressed_tensors
from jaxquant.checkpoints.compressed_tensors_config import describe, find_group, read_groups
from jaxquant.checkpoints.pack_quantized import pack, unpack
from jaxquant.checkpoints.tensors import same_bits
from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec

torch = pytest.importorskip("torch")
helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
quantization = pytest.importorskip("compressed_tensors.quantization")
match = pytest.importorskip("compressed_tensors.utils.match")

GOLDEN = json.loads(Path(__file__).with_name("data").joinpath("compressed_tensors_golden.json").read_text())
BF16 = ml_dtypes.bfloat16


def golden(name):
    """The packed tensors of a golden file, its spec and K."""
    vectors = GOLDEN[name]
    (group,) = read_groups(vectors["quantization_config"])
    arrays = {
        "weight_packed": np.array(vectors["weight_packed"], np.int32),
        "weight_scale": np.array(vectors["weight_scale"], np.float32).astype(BF16),
        "weight_shape": np.array(vectors["weight_shape"], np.int64),
    }
    if not group.spec.symmetric:
        arrays["weight_zero_point"] = np.array(vectors["weight_zero_point"], np.int32)
    return vectors, arrays, group.spec


def read_golden(name):
    vectors, arrays, spec = golden(name)
    return vectors, unpack(arrays, spec)


@pytest.mark.parametrize("name", ["W4A16", "W8A16", "W4A16_ASYM"])
def test_golden_files_both_ways(name):
    vectors, q = read_golden(name)
    q.validate()
    dequantized = dequantize(q)
    assert dequantized.dtype == BF16
    np.testing.assert_array_equal(np.asarray(dequantized, np.float32).T, np.float32(vectors["dequantized"]))
    _, arrays, _ = golden(name)
    packed = pack(q)
    assert packed.keys() == arrays.keys()
    assert all(same_bits(packed[part], arrays[part]) for part in arrays)


@pytest.mark.parametrize("name", ["W4A16", "W8A16"])
def test_quantize_agrees_with_upstream_but_for_its_rounding_of_the_quotient(name):
    """Same scales. Upstream divides in bfloat16, which rounds some quotients to the other side of a half."""
    vectors, theirs = read_golden(name)
    w = np.array(vectors["weight"], np.float32).astype(BF16).T
    ours = quantize(jnp.asarray(w), theirs.spec)
    assert same_bits(ours.scale, theirs.scale)
    scale = np.repeat(np.asarray(ours.scale), theirs.spec.group_size, axis=0)
    in_bfloat16 = np.round((w / scale).astype(np.float32)).clip(theirs.spec.min_code, theirs.spec.max_code)
    np.testing.assert_array_equal(in_bfloat16, theirs.codes)
    assert 0 < np.count_nonzero(ours.codes != theirs.codes) < 0.15 * ours.size
    error = [np.abs(np.asarray(q.codes, np.float32) * np.float32(scale) - np.float32(w)).sum() for q in (ours, theirs)]
    assert error[0] < error[1]


def random_codes(bits, k, n, symmetric=True):
    """A QTensor `[k, n]` of random codes (and zero points) and unit scales."""
    spec, generator = QuantSpec(bits=bits, symmetric=symmetric), np.random.default_rng(bits)
    codes, zeros = (generator.integers(spec.min_code, spec.max_code + 1, (m, n)).astype(np.int8) for m in (k, 1))
    scale = jnp.ones((1, n), jnp.float32)
    return QTensor.from_codes(
        jnp.asarray(codes), scale, None if symmetric else jnp.asarray(zeros), spec, dtype="float32"
    )


def unpack_like(q, packed, zero_point=None):
    """Codes from elsewhere, with the scales and the shape of `q`."""
    arrays = {"weight_packed": packed, "weight_scale": np.asarray(q.scale).T, "weight_shape": np.array(q.shape[::-1])}
    return unpack(arrays if zero_point is None else arrays | {"weight_zero_point": zero_point}, q.spec)


def same_leaves(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(map(same_bits, *map(jax.tree.leaves, (a, b))))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("k", [20, 96])
def test_codes_pack_and_unpack_as_upstream(bits, k):
    q = random_codes(bits, k, 3)
    codes = torch.from_numpy(np.asarray(q.codes).T.copy())
    theirs, ours = helpers.pack_to_int32(codes, bits).numpy(), pack(q)
    assert same_bits(ours["weight_packed"], theirs)
    assert torch.equal(helpers.unpack_from_int32(torch.from_numpy(ours["weight_packed"]), bits, codes.shape), codes)
    assert same_leaves(unpack_like(q, theirs), q)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [3, 40])
def test_zero_points_pack_and_unpack_as_upstream(bits, n):
    q = random_codes(bits, 16, n, symmetric=False)
    zeros = torch.from_numpy(np.asarray(q.zero_point).T.copy())
    theirs, ours = helpers.pack_to_int32(zeros, bits, packed_dim=0).numpy(), pack(q)
    assert same_bits(ours["weight_zero_point"], theirs)
    again = helpers.unpack_from_int32(torch.from_numpy(ours["weight_zero_point"]), bits, zeros.shape, packed_dim=0)
    assert torch.equal(again, zeros)
    assert same_leaves(unpack_like(q, ours["weight_packed"], theirs), q)


def layout_before_0_18(codes, bits):
    """Of each row, words of as many whole codes as fit, the first in the lowest bits."""
    rows = []
    for row in codes.T.tolist():
        fields, per_word = [code + 2 ** (bits - 1) for code in row], 32 // bits
        starts = range(0, len(fields), per_word)
        rows.append([sum(u << bits * j for j, u in enumerate(fields[i : i + per_word])) for i in starts])
    return np.array(rows, np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("k", [32, 96])
def test_the_layout_of_old_releases_is_read(bits, k):
    """At 2, 4 and 8 bits the two are one, and `pack` writes it."""
    q = random_codes(bits, k, 3)
    old = layout_before_0_18(np.asarray(q.codes), bits)
    assert same_bits(old, pack(q)["weight_packed"]) == (bits in (2, 4, 8))
    assert same_leaves(unpack_like(q, old), q)


LINEARS = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.down", "model.layers.1.down", "lm_head"]
CLASSES = {**dict.fromkeys(LINEARS, "Linear"), "model.embed": "Embedding"}
INT4, INT8 = QuantSpec(bits=4, group_size=32), QuantSpec(bits=8)


def weight(spec, shape=(64, 8), **axes):
    return quantize(jax.random.normal(jax.random.key(0), shape), spec, **axes)


def model_tensors(**specs):
    """Tensors by name: the modules of LINEARS named by layer and kind (`q0=INT4`), and a norm."""
    names = dict(zip(("q0", "q1", "down0", "down1", "head"), LINEARS, strict=True))
    quantized = {f"{names[key]}.weight": weight(spec) for key, spec in specs.items()}
    return {"model.norm.weight": np.ones(64, np.float32), **quantized}


def write(directory, tensors, hf_config=None):
    write_compressed_tensors(directory, hf_config or {"model_type": "llama"}, tensors, CLASSES)
    return json.loads((directory / "config.json").read_text())


def test_write_and_read(tmp_path):
    asymmetric = QuantSpec(bits=3, group_size=32, symmetric=False)
    tensors = model_tensors(q0=INT4, q1=INT4, down0=INT8, down1=INT8, head=asymmetric)
    config = write(tmp_path, tensors, {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": 1})
    assert config["model_type"] == "llama"
    assert config["torch_dtype"] == "float32"
    assert "dtype" not in config
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.norm.weight"].shape == (64,)
    assert {n: (a.dtype.name, a.shape) for n, a in stored.items() if n.startswith(LINEARS[0])} == {
        "model.layers.0.q_proj.weight_packed": ("int32", (8, 8)),
        "model.layers.0.q_proj.weight_scale": ("float32", (8, 2)),
        "model.layers.0.q_proj.weight_shape": ("int64", (2,)),
    }
    read = CompressedTensors(tmp_path, config["quantization_config"], CLASSES)
    assert set(read) == set(tensors)
    assert len(read) == len(tensors)
    assert "model.layers.0.q_proj.weight_packed" not in read
    for name, tensor in tensors.items():
        assert same_leaves(read[name], tensor)


def test_one_spec_is_the_group_of_all_linears():
    config = describe(dict.fromkeys(LINEARS[:4], INT4), CLASSES)
    expected = copy.deepcopy(GOLDEN["W4A16"]["quantization_config"])
    del expected["moe_sparsity_config"]  # new in 0.20, optional
    expected["config_groups"]["group_0"]["weights"]["group_size"] = 32
    assert config == expected


CHANNEL, THREE = QuantSpec(bits=4), QuantSpec(bits=3, group_size=32)
EMBEDDING = weight(THREE, (10, 64), contract=(-1,), out=(-2,))


@pytest.mark.parametrize(
    ("specs", "targets"),
    [
        (
            dict(zip(LINEARS, (INT4, INT4, INT8, INT8), strict=False)),
            [[r"re:^model\.layers\.\d+\.q_proj$"], [r"re:^model\.layers\.\d+\.down$"]],
        ),
        (
            dict(zip(LINEARS, (INT4, CHANNEL, THREE, THREE), strict=False)),
            [["model.layers.0.q_proj"], ["model.layers.1.q_proj"], [r"re:^model\.layers\.\d+\.down$"]],
        ),
        (dict(zip(LINEARS, (INT4, INT8), strict=False)), [["model.layers.0.q_proj"], ["model.layers.1.q_proj"]]),
    ],
)
def test_several_specs_are_groups_that_upstream_understands(specs, targets):
    config = describe(specs, CLASSES)
    assert [group["targets"] for group in config["config_groups"].values()] == targets
    assert config["ignore"] == [module for module in LINEARS if module not in specs]
    upstream = quantization.QuantizationConfig.model_validate(config)
    groups = read_groups(config)
    for module, spec in specs.items():
        named = [g for g in upstream.config_groups.values() if any(match.match_name(module, t) for t in g.targets)]
        assert [(g.weights.num_bits, g.weights.group_size) for g in named] == [(spec.bits, spec.group_size)]
        assert find_group(module, "Linear", groups).spec == spec


def test_reading_prefers_a_name_to_a_pattern_and_both_to_the_class():
    def group(bits, *targets):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights}

    config = {"config_groups": {"a": group(2, "Linear"), "b": group(3, r"re:.*\.down"), "c": group(4, "x.down")}}
    groups = read_groups(config)
    assert [find_group(m, "Linear", groups).spec.bits for m in ("x.down", "y.down", "y.up")] == [4, 3, 2]


def bfloat16_scales(q, **fields):
    return dataclasses.replace(q, scale=q.scale.astype(BF16), **fields)


UP = "model.layers.0.q_proj.weight"
REFUSED = {
    "nothing quantized": ({UP: np.ones((8, 64), np.float32)}, "nothing is quantized.*format='jaxquant'"),
    "narrow range": ({UP: weight(QuantSpec(narrow_range=True))}, "narrow_range has no place in the format"),
    "per tensor": ({UP: weight(QuantSpec(granularity="per_tensor"))}, "granularity per_tensor is not supported"),
    "no module": ({"model.norm.weight": weight(INT4)}, "model.norm.weight: it is quantized but no Linear or Embedding"),
    "embedding": ({"model.embed.weight": weight(INT4)}, r"contracted over \(-2,\); expected the matrix of a Embedding"),
    "stacked": ({UP: weight(INT4, (2, 64, 8))}, r"\[2, 64, 8\] contracted over \(-2,\); expected the matrix of a"),
    "transposed": ({UP: weight(INT4, contract=(-1,), out=(-2,), shape=(8, 64))}, r"contracted over \(-1,\)"),
    "other scales": (
        {UP: dataclasses.replace(weight(INT4), dtype="bfloat16")},
        "stands for bfloat16 and has float32 scales; .* which would change them",
    ),
    "float64": ({UP: weight(INT4), "x": np.ones(3)}, "x: it is float64; cast it to one of float32"),
    "two dtypes": (
        {UP: weight(INT4), "lm_head.weight": bfloat16_scales(weight(INT4), dtype="bfloat16")},
        "stand for weights of .*one dtype per model",
    ),
    "invalid": ({UP: jax.tree.map(lambda a: a[:1], weight(INT4))}, f"{UP}: values is .* contradicts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_cannot_say_is_refused_before_anything_is_written(tmp_path, case):
    tensors, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        write(tmp_path, tensors)
    assert list(tmp_path.iterdir()) == []


def test_codes_that_read_back_differently_are_an_error(tmp_path, monkeypatch):
    def wrong(q):
        arrays = pack(q)
        arrays["weight_packed"][0, 0] ^= 1
        return arrays

    monkeypatch.setattr(pack_quantized, "pack", wrong)
    with pytest.raises(OSError, match=f"{LINEARS[0]} reads back differently from what was written"):
        write(tmp_path, model_tensors(q0=INT4))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weight_scale": None}, "q_proj.weight_scale is missing, but the"),
        ({"weight_shape": None}, "q_proj.weight_shape is missing, but the"),
        ({"weight_shape": np.array([8, 8, 8])}, "two sizes are expected"),
        ({"weight_shape": np.array([8, -64])}, "two sizes are expected"),
        ({"weight_shape": np.ones(2, np.float32)}, "two sizes are expected"),
        ({"weight_shape": np.array([8, 2**60])}, "which does not fit QuantSpec"),
        ({"weight_shape": np.array([8, 62])}, "q_proj: group_size=32 does not divide"),
        ({"weight_packed": np.zeros((8, 8), np.int64)}, r"q_proj.weight_packed is int64\[8, 8\], which does not"),
        (
            {"weight_packed": np.zeros((8, 9), np.int32)},
            r"packed is int32\[8, 9\], which .* expected int32\[8, 8\]",
        ),
        (
            {"weight_scale": np.zeros((8, 3), np.float32)},
            r"scale is float32\[8, 3\], which .* expected \[8, 2\]",
        ),
        ({"weight_scale": np.zeros((8, 2), np.float64)}, r"scales of \['float32', 'float64'\]; expected one of"),
        ({"weight_scale": np.zeros((8, 2), np.float16)}, r"scales of \['float16', 'float32'\]; expected one of"),
        (
            {"weight_zero_point": np.zeros((1, 2), np.int32)},
            "weight_zero_point is not supported beside pack-quantized",
        ),
        ({"weight": np.zeros((8, 64), np.float32)}, "q_proj.weight is not supported beside pack-quantized"),
    ],
)
def test_damaged_tensors_are_one_clear_error(tmp_path, arrays, message):
    config = write(tmp_path, model_tensors(q0=INT4, q1=INT4))
    damage(tmp_path, LINEARS[0], **arrays)
    with pytest.raises(ValueError, match=message):
        CompressedTensors(tmp_path, config["quantization_config"], CLASSES)


def test_a_checkpoint_of_an_old_release_is_read(tmp_path):
    q = weight(dataclasses.replace(THREE, symmetric=False), (64, 32))
    config = write(tmp_path, {UP: q})
    old, zeros = (layout_before_0_18(np.asarray(a), 3) for a in (q.codes, q.zero_point.T))
    assert old.shape == (32, 7)  # ten codes in a word: 64 take 7, where the dense layout takes 6
    damage(tmp_path, LINEARS[0], weight_packed=old, weight_zero_point=np.ascontiguousarray(zeros.T))
    assert same_leaves(CompressedTensors(tmp_path, config["quantization_config"], CLASSES)[UP], q)


@pytest.mark.parametrize(
    ("zero_point", "message"),
    [
        (None, "q_proj.weight_zero_point is missing, but the"),
        (
            np.zeros((2, 2), np.int32),
            r"zero_point is int32\[2, 2\], which .* expected int32\[1, 2\]",
        ),
        (np.zeros((1, 2), np.int8), r"weight_zero_point is int8\[1, 2\], which does not fit"),
    ],
)
def test_damaged_zero_points_are_one_clear_error(tmp_path, zero_point, message):
    config = write(tmp_path, {UP: weight(QuantSpec(bits=4, group_size=32, symmetric=False))})
    damage(tmp_path, LINEARS[0], weight_zero_point=zero_point)
    with pytest.raises(ValueError, match=message):
        CompressedTensors(tmp_path, config["quantization_config"], CLASSES)


def edit(path, value):
    """Sets a value deep inside a configuration; "..." stands for the group."""

    def change(config):
        inner = config
        *parents, last = path.replace("...", "config_groups.group_0").split(".")
        for key in parents:
            inner = inner[key]
        inner[last] = value

    return change


CODES = {"num_bits": 4, "strategy": "channel"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("format", "float-quantized"), "format='float-quantized' is not supported"),
        (edit("....format", "int-quantized"), "format='int-quantized' without input_activations is not supported"),
        (edit("quant_method", "gptq"), "quant_method='gptq' is not supported"),
        (edit("transform_config", {"R1": {}}), "transform_config=.* is not supported"),
        (edit("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme=.* is not supported"),
        (edit("surprise", 1), "quantization_config: surprise=1 is not supported"),
        (edit("config_groups", []), r"config_groups=\[\] is not supported; expected named groups"),
        (edit("config_groups", {}), "q_proj is quantized, but no group of the quantization_config names it"),
        (edit("...", "W4A16"), "group_0: 'W4A16' is not supported; expected an object"),
        (
            edit("....input_activations", {"num_bits": 8}),
            "'pack-quantized' with input_activations is not",
        ),
        (edit("....targets", "Linear"), "targets='Linear' is not supported; expected names"),
        (edit("....targets", ["re:("]), r"target 're:\(' is no regular expression"),
        (edit("....weights", None), "group_0: weights: None is not supported"),
        (edit("....weights.symmetric", False), "q_proj.weight_zero_point is missing, but the"),
        (edit("....weights.symmetric", None), "weights: symmetric=None is not supported"),
        (edit("....weights.type", "float"), "weights: type='float' is not supported"),
        (edit("....weights.strategy", "tensor"), "weights: strategy='tensor' is not supported"),
        (edit("....weights.strategy", None), "weights: strategy=None is not supported"),
        (edit("....weights.group_size", None), "strategy='group' with group_size=None is not supported"),
        (edit("....weights.group_size", -3), "group_0: group_size=-3 must be a positive whole number"),
        (edit("....weights.num_bits", 1), "group_0: bits=1 is not supported"),
        (edit("....weights.num_bits", 8), "does not fit QuantSpec"),
        (edit("....weights.actorder", "group"), "q_proj.weight_g_idx is missing, but the"),
        (edit("....weights.actorder", "sideways"), "weights: actorder='sideways' is not supported"),
        (edit("....weights", {**CODES, "actorder": "group"}), "actorder='group' with strategy='channel' is not"),
    ],
)
def test_a_configuration_that_is_not_understood_is_one_clear_error(tmp_path, change, message):
    config = write(tmp_path, model_tensors(q0=INT4))["quantization_config"]
    change(config)
    with pytest.raises(ValueError, match=message):
        CompressedTensors(tmp_path, config, CLASSES)


IN_ORDER = np.arange(64, dtype=np.int32) // 32


@pytest.mark.parametrize("word", ["group", "dynamic", True])
def test_groups_of_inputs_from_everywhere_are_read(tmp_path, word):
    q = weight(INT4)
    config = write(tmp_path, {UP: q, LINEARS[1] + ".weight": q, LINEARS[2] + ".weight": weight(INT8)})
    index = np.random.default_rng(0).permutation(IN_ORDER)
    damage(tmp_path, LINEARS[0], weight_g_idx=index)
    damage(tmp_path, LINEARS[1], weight_g_idx=np.full(64, -1, np.int32))  # where no order was found
    edit("....weights.actorder", word)(config["quantization_config"])
    read = CompressedTensors(tmp_path, config["quantization_config"], CLASSES)
    w, scale = np.zeros((64, 8), np.float32), np.asarray(q.scale)
    for i, group in enumerate(index):
        w[i] = np.asarray(q.codes)[i] * scale[group]
    np.testing.assert_array_equal(dequantize(read[UP]), w)
    np.testing.assert_array_equal(dequantize(read[LINEARS[1] + ".weight"]), dequantize(q))
    assert jax.tree.structure(read[UP]) == jax.tree.structure(read[LINEARS[1] + ".weight"])  # they can be stacked
    assert read[LINEARS[2] + ".weight"].input_order is None


def test_the_order_of_groups_is_said_where_there_are_groups(tmp_path):
    q = in_order_of_groups(weight(INT4))
    config = write(tmp_path, {UP: q, LINEARS[2] + ".weight": weight(INT8), "model.embed.weight": EMBEDDING})
    groups = config["quantization_config"]["config_groups"].values()
    assert {g["weights"]["num_bits"]: g["weights"].get("actorder") for g in groups} == {4: "group", 8: None, 3: "group"}
    read = CompressedTensors(tmp_path, config["quantization_config"], CLASSES)
    assert same_leaves(read[UP], q)
    np.testing.assert_array_equal(dequantize(read["model.embed.weight"]), dequantize(EMBEDDING))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weight_g_idx": None}, "q_proj.weight_g_idx is missing, but the"),
        ({"weight_g_idx": IN_ORDER[1:]}, r"weight_g_idx is int32\[63\], which does not fit .* expected int32\[64\]"),
        ({"weight_g_idx": IN_ORDER.astype(np.int64)}, r"weight_g_idx is int64\[64\], which does not fit"),
        ({"weight_g_idx": IN_ORDER * 0}, "q_proj.weight_g_idx does not give each of 2 groups as many inputs"),
        ({"weight_g_idx": IN_ORDER - 1}, "q_proj.weight_g_idx does not give each of 2 groups as many inputs"),
        ({"weight_g_idx": IN_ORDER * 2}, "q_proj.weight_g_idx does not give each of 2 groups as many inputs"),
    ],
)
def test_a_damaged_order_is_one_clear_error(tmp_path, arrays, message):
    config = write(tmp_path, {UP: in_order_of_groups(weight(INT4))})
    damage(tmp_path, LINEARS[0], **arrays)
    with pytest.raises(ValueError, match=message):
        CompressedTensors(tmp_path, config["quantization_config"], CLASSES)


def test_an_order_that_the_configuration_does_not_name_is_an_error(tmp_path):
    config = write(tmp_path, {UP: in_order_of_groups(weight(INT4))})["quantization_config"]
    edit("....weights.actorder", "static")(config)
    with pytest.raises(ValueError, match="weight_g_idx is not supported beside pack-quantized"):
        CompressedTensors(tmp_path, config, CLASSES)


def test_what_other_writers_add_is_understood(tmp_path):
    config = write(tmp_path, model_tensors(q0=INT4))["quantization_config"]
    config |= {"version": "0.20.0", "sparsity_config": {}, "transform_config": {}}
    config["config_groups"]["group_0"]["weights"] |= {
        "actorder": "weight",
        "block_structure": None,
        "observer": "mse",
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None,
    }
    for word in ("weight", "static", False, None):
        config["config_groups"]["group_0"]["weights"]["actorder"] = word
        assert CompressedTensors(tmp_path, config, CLASSES).specs == {UP: INT4}
