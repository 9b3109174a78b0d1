"""compressed-tensors' int-quantized and quantized embeddings, against the upstream package and transformers."""

import dataclasses
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_models
from damaged import damage
from safetensors.numpy import load_file, save_file

import jaxquant as jq
from jaxquant.checkpoints import int_quantized
from jaxquant.checkpoints.compressed_tensors import CompressedTensors
from jaxquant.checkpoints.compressed_tensors_config import read_groups
from jaxquant.checkpoints.tensors import same_bits
from jaxquant.numerics.activations import round_input

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
quantization = pytest.importorskip("compressed_tensors.quantization")

TOKENS = np.random.default_rng(0).integers(32, 64, (2, 24)).astype(np.int32)
CALIBRATION = TOKENS - 32  # others: the largest input of a calibration token lies on the edge between two codes
CONFIG = {**small_models.CONFIG, "head_dim": 16}
ACTIVATIONS = {
    "dynamic": jq.ActivationSpec(),
    "static": jq.ActivationSpec(static=True),
    "static, asymmetric": jq.ActivationSpec(static=True, symmetric=False),
}
W8 = jq.int8(activations=ACTIVATIONS["dynamic"])
Q = "model.layers.0.self_attn.q_proj"


def test_golden_file_both_ways():
    path = Path(__file__).with_name("data") / "compressed_tensors_golden.json"
    vectors = json.loads(path.read_text())["W8A8"]
    (group,) = read_groups(vectors["quantization_config"])
    assert group.spec == W8
    scale = np.array(vectors["weight_scale"], np.float32).astype(ml_dtypes.bfloat16)
    arrays = {"weight": np.array(vectors["codes"], np.int8), "weight_scale": scale}
    q = int_quantized.unpack(arrays, group.spec)
    q.validate()
    np.testing.assert_array_equal(np.float32(jq.dequantize(q)).T, np.float32(vectors["dequantized"]))
    again = int_quantized.pack(q)
    assert again.keys() == arrays.keys()
    assert all(same_bits(again[part], arrays[part]) for part in arrays)


def test_asymmetric_weights_of_four_bits_in_groups_come_back():
    spec = jq.int4(group_size=16, symmetric=False, activations=ACTIVATIONS["static"])
    q = jq.quantize(jax.random.normal(jax.random.key(0), (64, 8)), spec)
    q = dataclasses.replace(q, input_scale=jnp.full((1, 1), 0.5))
    arrays = int_quantized.pack(q)
    assert {part: (a.dtype.name, a.shape) for part, a in arrays.items()} == {
        "weight": ("int8", (8, 64)),
        "weight_scale": ("float32", (8, 4)),
        "weight_zero_point": ("int8", (8, 4)),
        "input_scale": ("float32", (1,)),
    }
    again = int_quantized.unpack(arrays, spec)
    assert again.spec == spec
    assert all(map(same_bits, jax.tree.leaves(again), jax.tree.leaves(q)))


def random_model():
    model = jq.Model.from_hf(CONFIG)
    params = jax.tree.map(lambda a: 8 * a if a.ndim > 1 else a, model.init(jax.random.key(0)))
    return model, params, jq.calibrate(model.apply, params, [CALIBRATION])


def torch_logits(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and compressed-tensors' own deprecations
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


def distance(found, expected):
    """Relative error of logits; inputs on the edge between two codes may be rounded either way."""
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("strategy", ["token", "tensor"])
def test_dynamic_inputs_are_rounded_as_upstream_does(strategy):
    """Bit for bit but at the extremes, which lie half way between two codes: upstream divides by the scale there."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    args = quantization.QuantizationArgs(num_bits=8, symmetric=True, strategy=strategy, dynamic=True)
    x = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    module = torch.nn.Linear(64, 8)
    module.quantization_status = quantization.QuantizationStatus.FROZEN
    theirs = forward_quantize(module, torch.from_numpy(x)[None], "input", args)[0].numpy()
    ours = round_input(jnp.asarray(x), None, jq.ActivationSpec(granularity=f"per_{strategy}"))
    extreme = np.abs(x) == np.abs(x).max(axis=1 if strategy == "token" else None, keepdims=True)
    np.testing.assert_allclose(ours[~extreme], theirs[~extreme], rtol=1e-6)
    np.testing.assert_allclose(ours, theirs, atol=1.01 * np.abs(x).max() / 127.5)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_transformers_computes_the_same_logits(tmp_path, kind):
    model, params, stats = random_model()
    config = jq.GPTQ(jq.int8(activations=ACTIVATIONS[kind]))
    qparams, _ = jq.quantize_params(params, stats, model.recipe(config))
    jq.save(tmp_path / "out", model, qparams, format="compressed-tensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored[f"{Q}.weight"].dtype == np.int8
    assert (f"{Q}.input_scale" in stored) == kind.startswith("static")
    assert (f"{Q}.input_zero_point" in stored) == kind.endswith("asymmetric")
    theirs = torch_logits(tmp_path / "out")
    error = distance(model.apply(qparams, TOKENS), theirs)
    assert error < (0.06 if kind == "dynamic" else 1e-5)  # the largest input of each token may take another code
    weights_only = jax.tree.map(
        lambda q: (
            dataclasses.replace(q, spec=jq.int8(), input_scale=None, input_zero_point=None)
            if isinstance(q, jq.QTensor)
            else q
        ),
        qparams,
        is_leaf=lambda leaf: isinstance(leaf, jq.QTensor),
    )
    assert distance(model.apply(weights_only, TOKENS), theirs) > 1.5 * error  # their inputs are rounded too
    _, loaded = jq.load_pretrained(tmp_path / "out")
    assert jax.tree.structure(loaded) == jax.tree.structure(qparams)
    assert all(map(same_bits, jax.tree.leaves(loaded), jax.tree.leaves(qparams)))


def test_head_and_embedding_are_quantized_or_left(tmp_path):
    """Three formats in one directory: int-quantized layers, a packed embedding, and a packed head of other bits."""
    model, params, stats = random_model()
    recipe = [
        ("embed_tokens/embedding", jq.RTN(jq.int4(group_size=32))),
        ("lm_head/kernel", jq.GPTQ(jq.int8())),
        (".*norm/scale", None),
        ("layers/.*", jq.RTN(W8)),
    ]
    qparams, _ = jq.quantize_params(params, stats, recipe)
    jq.save(tmp_path / "out", model, qparams, format="compressed-tensors")
    storage = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert storage["format"] == "mixed-precision"
    assert storage["ignore"] == []
    quantization.QuantizationConfig.model_validate(storage)
    _, loaded = jq.load_pretrained(tmp_path / "out")
    assert jax.tree.structure(loaded) == jax.tree.structure(qparams)
    assert all(map(same_bits, jax.tree.leaves(loaded), jax.tree.leaves(qparams)))
    same = model.apply(loaded, TOKENS)
    np.testing.assert_array_equal(same, model.apply(qparams, TOKENS))
    left = model.recipe(jq.RTN(jq.int8()))
    qparams, _ = jq.quantize_params(params, stats, [("lm_head/kernel", jq.RTN(jq.int4())), *left[:1], *left[2:]])
    jq.save(tmp_path / "head", model, qparams, format="compressed-tensors")
    assert distance(model.apply(qparams, TOKENS), torch_logits(tmp_path / "head")) < 1e-5


def written_upstream(directory, activations, targets=("Linear",), bits=None, group_size=32, symmetric=True):
    """A random model, quantized and written by compressed-tensors alone; returns the weights that it stands for."""
    from compressed_tensors.compressors import ModelCompressor

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    group_size = None if activations else group_size
    strategy = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    bits = bits or (8 if activations else 4)
    weights = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    inputs = activations and quantization.QuantizationArgs(
        **{"num_bits": 8, "type": "int", "symmetric": True, **activations}
    )
    scheme = quantization.QuantizationScheme(targets=list(targets), weights=weights, input_activations=inputs)
    ignore = [] if "Embedding" in targets else ["lm_head"]
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore)
    )
    meant = {}
    for name, module in model.named_modules():
        if not hasattr(module, "quantization_scheme") or not hasattr(module, "weight"):
            continue
        w = module.weight.data.mul_(8)
        groups = w.reshape(len(w), -1, group_size or w.shape[1])
        scale, zero = chosen(groups, bits, symmetric)
        module.weight_scale.data = scale
        if not symmetric:
            module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
        codes = (groups / scale[..., None]).round() + zero[..., None]
        codes = codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        meant[name] = ((codes - zero[..., None]) * scale[..., None]).reshape(w.shape).numpy()
        if hasattr(module, "input_scale"):
            module.input_scale.data = torch.tensor([0.02])
        if hasattr(module, "input_zero_point"):
            zero = 0 if inputs.symmetric else -9
            module.input_zero_point.data = torch.tensor([zero], dtype=torch.int8)
        module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    return meant


def chosen(groups, bits, symmetric):
    """Scales and zero points of weights `[rows, groups, inputs]`."""
    if symmetric:
        scale = groups.abs().amax(-1) * (2 / (2**bits - 1))
        return scale, torch.zeros_like(scale)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, (-(2 ** (bits - 1)) - low / scale).round()


def read_upstream(directory, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meant = written_upstream(directory, *arguments, **options)
    model, params = jq.load_pretrained(directory)
    return model, params, meant


STRATEGIES = {
    "dynamic": ({"strategy": "token", "dynamic": True}, jq.ActivationSpec()),
    "dynamic per tensor": ({"strategy": "tensor", "dynamic": True}, jq.ActivationSpec(granularity="per_tensor")),
    "static": ({"strategy": "tensor", "dynamic": False}, jq.ActivationSpec(static=True)),
    "static, asymmetric": (
        {"strategy": "tensor", "dynamic": False, "symmetric": False},
        jq.ActivationSpec(static=True, symmetric=False),
    ),
}


@pytest.mark.parametrize("kind", STRATEGIES)
def test_files_of_compressed_tensors_are_read(tmp_path, kind):
    given, expected = STRATEGIES[kind]
    model, params, meant = read_upstream(tmp_path / "out", given)
    q = params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert q.spec == jq.int8(activations=expected)
    np.testing.assert_allclose(jq.dequantize(q)[0].T, meant[Q], rtol=1e-6)
    assert distance(model.apply(params, TOKENS), torch_logits(tmp_path / "out")) < (1e-5 if expected.static else 0.06)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(4, 32, False), (4, None, True), (3, 16, True), (8, 32, False), (8, None, True)],
)
def test_packed_files_of_compressed_tensors_are_read(tmp_path, bits, group_size, symmetric):
    """And written back as they were."""
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    model, params, meant = read_upstream(tmp_path / "out", None, **options)
    for layer, q in enumerate(jq.dequantize(params["layers"]["self_attn"]["q_proj"]["kernel"])):
        np.testing.assert_allclose(q.T, meant[Q.replace("0", str(layer))], rtol=1e-5, atol=1e-7)
    assert params["layers"]["mlp"]["down_proj"]["kernel"].spec == jq.QuantSpec(bits, group_size, symmetric)
    jq.save(tmp_path / "again", model, params, format="compressed-tensors")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert theirs.keys() == ours.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_asymmetric_weights_with_rounded_inputs_of_compressed_tensors_are_read(tmp_path):
    given, expected = STRATEGIES["dynamic"]
    _, params, meant = read_upstream(tmp_path / "out", given, symmetric=False)
    q = params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert q.spec == jq.int8(symmetric=False, activations=expected)
    np.testing.assert_allclose(jq.dequantize(q)[0].T, meant[Q], rtol=1e-5, atol=1e-7)


def test_a_packed_embedding_of_compressed_tensors_is_read(tmp_path):
    _, params, meant = read_upstream(tmp_path / "out", None, ("Linear", "Embedding"))
    q = params["embed_tokens"]["embedding"]
    assert q.spec == params["lm_head"]["kernel"].spec == jq.int4(group_size=32)
    np.testing.assert_allclose(jq.dequantize(q), meant["model.embed_tokens"], rtol=1e-6)


@pytest.fixture
def written(tmp_path):
    """A W8A8 checkpoint with static inputs; returns a function that changes its tensors and reads it."""
    model, params, stats = random_model()
    config = jq.RTN(jq.int8(activations=ACTIVATIONS["static"]))
    qparams, _ = jq.quantize_params(params, stats, model.recipe(config))
    out = tmp_path / "out"
    jq.save(out, model, qparams, format="compressed-tensors")

    def read(change_storage=None, **arrays):
        damage(out, Q, **arrays)
        hf_config = json.loads((out / "config.json").read_text())
        if change_storage is not None:
            change_storage(hf_config["quantization_config"]["config_groups"]["group_0"])
            (out / "config.json").write_text(json.dumps(hf_config))
        return jq.load_pretrained(out)

    return read


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weight_scale": None}, "q_proj.weight_scale is missing, but the quantization_config says int-quantized"),
        ({"input_scale": None}, "q_proj.input_scale is missing"),
        ({"weight": None}, "q_proj.weight is missing"),
        ({"weight": np.zeros((64, 64), np.float32)}, r"q_proj.weight is float32\[64, 64\], which .* int8\[64, 64\]"),
        ({"weight": np.zeros(64, np.int8)}, r"the shape of its weight is \[64\], but two sizes are expected"),
        ({"weight_scale": np.ones((64, 2), np.float32)}, r"weight_scale is float32\[64, 2\], which does not fit"),
        ({"input_scale": np.ones(2, np.float32)}, r"input_scale is float32\[2\], which does not fit"),
        ({"input_scale": np.zeros(1, np.float32)}, "q_proj.input_scale holds what is no scale"),
        ({"input_scale": -np.ones(1, np.float32)}, "q_proj.input_scale holds what is no scale"),
        ({"weight_scale": np.full((64, 1), np.nan, np.float32)}, "q_proj.weight_scale holds what is no scale"),
        ({"input_scale": None, "weight_scale": None}, "tensor .*q_proj.weight is int8; expected one of float32"),
        ({"input_scale": np.ones(1, np.int8)}, r"scales of \['float32', 'int8'\]; expected one of"),
        ({"weight_zero_point": np.zeros((64, 1), np.int8)}, "weight_zero_point is not supported beside int-quantized"),
        ({"input_zero_point": np.ones(1, np.int8)}, r"input_zero_point=\[1\] beside symmetric inputs is not supported"),
    ],
)
def test_damaged_tensors_are_one_clear_error(written, arrays, message):
    with pytest.raises(ValueError, match=message):
        written(**arrays)


def test_zero_points_of_zero_beside_symmetric_inputs_are_read(written):
    _, params = written(input_zero_point=np.zeros(1, np.int8))
    assert params["layers"]["self_attn"]["q_proj"]["kernel"].spec.static_activations


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("symmetric", False, "input_zero_point is missing"),
        ("strategy", "token", "a static range is per_tensor; leave out static=True"),
        ("strategy", "group", "input_activations: strategy='group' is not supported"),
        ("dynamic", "local", "input_activations: dynamic='local' is not supported"),
        ("type", "float", "input_activations: type='float' is not supported"),
        ("num_bits", 1, "bits=1 is not supported"),
        ("surprise", 1, "input_activations: surprise=1 is not supported"),
    ],
)
def test_inputs_that_are_not_understood_are_refused(written, key, value, message):
    with pytest.raises(ValueError, match=message):
        written(lambda group: group["input_activations"].update({key: value}))


def test_codes_beyond_their_width_are_refused(written):
    def four_bits(group):
        group["weights"]["num_bits"] = 4

    with pytest.raises(ValueError, match=r"weight has codes from .*, which 4 bits do not hold"):
        written(four_bits)


def test_a_format_that_contradicts_the_inputs_is_refused(tmp_path):
    storage = {"format": "int-quantized", "config_groups": {"a": {"targets": ["Linear"], "weights": {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}}}  # fmt: skip
    save_file({f"{Q}.weight": np.zeros((8, 8), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="format='int-quantized' without input_activations is not supported"):
        CompressedTensors(tmp_path, storage, {})
