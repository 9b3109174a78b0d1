"""Channel scales folded into norms and linear layers: the same function, and files that others read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import TOKENS, VARIANTS, reference, tensors_of, written_by_transformers

import jaxquant as jq
from jaxquant.models.names import params_from_tensors
from jaxquant.models.stacking import layer_of
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.transforms.fold import unfolded
from jaxquant.transforms.tracing.interpreter import named_leaves

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# They fold as other variants of their family do.
ALIKE = {"gemma2", "gemma3", "phi3_long", "phi3_short", "mixtral", "qwen3_moe", "qwen3_moe_window"}
ALIKE |= {"gpt2_untied", "opt_untied"}
ACTIVATION_AWARE = jq.AWQ(jq.int4(group_size=32), grid=3)


@functools.cache
def model_of(variant):
    theirs = reference(variant)
    model = jq.Model.from_hf(
        {**written_by_transformers(theirs.config.to_dict()), "architectures": theirs.config.architectures}
    )
    return model, params_from_tensors(model.config, tensors_of(variant))


def scaled(model, params, seed=0):
    """8-bit weights with random channel scales, one for all weights that read one input."""
    rng, leaves = np.random.default_rng(seed), dict(named_leaves(params))
    for pair in model.fold_pairs:
        *lead, size, _ = min((leaves[path].shape for path in pair.readers), key=len)
        shared = jnp.asarray(np.exp(rng.normal(size=(*lead, size, 1))).astype(np.float32))
        for path in pair.readers:
            if path.endswith("/gate/kernel"):  # a router
                continue
            extra = leaves[path].shape[len(lead) : -2]
            d = jnp.broadcast_to(shared.reshape(*lead, *(1 for _ in extra), size, 1), (*lead, *extra, size, 1))
            leaves[path] = dataclasses.replace(jq.quantize(leaves[path] * d, jq.int8()), channel_scale=d)
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in ALIKE])
def test_folding_changes_nothing_but_rounding_errors(variant):
    model, params = model_of(variant)
    qparams = scaled(model, params)
    folded = jq.fold(qparams, model.fold_pairs)
    quantized = [leaf for leaf in jax.tree.leaves(folded, is_leaf=is_qtensor) if is_qtensor(leaf)]
    linear = [path for path, _ in named_leaves(params) if path.endswith("_proj/kernel")]
    left = model.config.num_heads != model.config.num_kv_heads  # whose values are shared by several query heads
    left += model.config.architecture.startswith("GPT2")  # whose inner product is behind a GELU
    assert len(quantized) == len(linear) - left
    assert all(q.channel_scale is None for q in quantized)
    want, found = model.apply(qparams, TOKENS), model.apply(folded, TOKENS)
    assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()
    wrong = jax.tree.map(
        lambda q: dataclasses.replace(q, channel_scale=None) if is_qtensor(q) else q, qparams, is_leaf=is_qtensor
    )
    assert np.abs(model.apply(wrong, TOKENS) - want).max() > 0.1 * np.abs(want).max()


@pytest.mark.parametrize("variant", ["mistral_window_of_one", "gemma2", "phi3", "mixtral", "opt"])
def test_folded_scales_are_found_again(variant):
    """From the float model and the folded one, layer by layer: exactly behind norms, else by a fit to 8-bit codes."""
    model, params = model_of(variant)
    qparams = scaled(model, params)
    folded = jq.fold(qparams, model.fold_pairs)
    readers = {path for pair in model.fold_pairs for path in pair.readers if not path.endswith("/gate/kernel")}
    for layer in range(model.config.num_layers):
        before, original = layer_of(qparams, layer), layer_of(params, layer)
        found = unfolded(layer_of(folded, layer), original, model.fold_pairs)
        for path in readers:
            expected, own = (jq.dequantize(leaves[path]) for leaves in (before, found))
            np.testing.assert_allclose(own, expected, rtol=1e-2, atol=1e-7, err_msg=path)
    assert unfolded(original, original, model.fold_pairs) == original


def test_norms_with_an_offset_keep_their_digits():
    """Stored is the scale minus one: where it becomes small, bfloat16 would round it away."""
    model, params = model_of("gemma3")
    qparams = scaled(model, params)
    for path in ("layers/input_layernorm/scale", "layers/pre_feedforward_layernorm/scale"):
        _, norm, _ = path.split("/")
        qparams["layers"][norm]["scale"] = params["layers"][norm]["scale"].astype(jnp.bfloat16)
    attention = qparams["layers"]["self_attn"]
    for name in "qkv":  # scales from 10 to 1000
        kernel = attention[f"{name}_proj"]["kernel"]
        large = 100 * jnp.clip(kernel.channel_scale, 0.1, 10)
        attention[f"{name}_proj"]["kernel"] = dataclasses.replace(kernel, channel_scale=large, scale=100 * kernel.scale)
    want = model.apply(qparams, TOKENS)
    found = model.apply(jq.fold(qparams, model.fold_pairs), TOKENS)
    assert np.linalg.norm(found - want) < 0.01 * np.linalg.norm(want)


def test_readers_that_are_not_quantized_are_compensated():
    model, params = model_of("mistral")
    qparams = scaled(model, params)
    qparams["layers"]["self_attn"]["k_proj"] = params["layers"]["self_attn"]["k_proj"]
    folded = jq.fold(qparams, model.fold_pairs)
    want, found = model.apply(qparams, TOKENS), model.apply(folded, TOKENS)
    assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()


def test_experts_with_scales_of_their_own_are_named():
    model, params = model_of("mixtral")
    qparams = scaled(model, params)
    experts = qparams["layers"]["mlp"]["experts"]
    kernel = experts["up_proj"]["kernel"]
    different = kernel.channel_scale.at[0, 1].multiply(2)
    experts["up_proj"]["kernel"] = dataclasses.replace(kernel, channel_scale=different)
    with pytest.raises(ValueError, match="matrices of 'layers/mlp/experts/up_proj/kernel' read the same input"):
        jq.fold(qparams, model.fold_pairs)


def test_what_cannot_be_folded_is_named():
    model, params = model_of("mistral_window_of_one")
    attention = scaled(model, params)["layers"]["self_attn"]
    readers = "layers/self_attn/k_proj/kernel' and 'layers/self_attn/q_proj/kernel' read the same input"
    for scale in (None, 2 * attention["k_proj"]["kernel"].channel_scale):
        qparams = scaled(model, params)
        kernel = qparams["layers"]["self_attn"]["k_proj"]["kernel"]
        qparams["layers"]["self_attn"]["k_proj"]["kernel"] = dataclasses.replace(kernel, channel_scale=scale)
        with pytest.raises(ValueError, match=readers):
            jq.fold(qparams, model.fold_pairs)
    qparams = scaled(model, params)
    whole = jq.quantize(params["layers"]["self_attn"]["v_proj"]["kernel"], jq.int8(granularity="per_tensor"))
    scale = qparams["layers"]["self_attn"]["v_proj"]["kernel"].channel_scale
    qparams["layers"]["self_attn"]["v_proj"]["kernel"] = dataclasses.replace(whole, channel_scale=scale)
    with pytest.raises(ValueError, match="v_proj/kernel' has one scale for all of its outputs"):
        jq.fold(qparams, model.fold_pairs)


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        ("mistral_window_of_one", ACTIVATION_AWARE),  # with all heads of their own
        ("mistral_window_of_one", jq.SmoothQuant(0.5)),
        ("qwen2", ACTIVATION_AWARE),
        ("qwen2", jq.SmoothQuant(0.5)),
        ("gemma3_new_words", ACTIVATION_AWARE),  # with norms that add one
        ("mixtral", ACTIVATION_AWARE),  # with experts
    ],
)
def test_scaled_weights_are_written_for_other_readers(variant, config, tmp_path):
    model, params = model_of(variant)
    stats = jq.calibrate(model.apply, params, [TOKENS])
    qparams, report = jq.quantize_params(params, stats, model.recipe(config, foldable=True))
    o_proj = next(row for row in report.layers if "o_proj" in row.path)
    assert (o_proj.method == "RTN") == (model.config.num_heads != model.config.num_kv_heads)
    jq.save(tmp_path / "out", model, qparams, format="compressed-tensors")
    want = model.apply(qparams, TOKENS)
    ours, read = jq.load_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    for found in (ours.apply(read, TOKENS), logits):
        if config.spec.activations is None:
            assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()
        else:  # the largest input of each token is a tie, and rounding errors decide to which code it goes
            assert np.abs(found - want).mean() < 0.05 * np.abs(want).mean()


def test_scaled_experts_are_written_in_autoawqs_format(tmp_path):
    model, params = model_of("qwen3_moe")
    config = jq.AWQ(jq.int4(group_size=32, symmetric=False, scale_dtype="float16"), grid=1)
    rules = [rule for rule in model.recipe(config, foldable=True) if "o_proj" not in rule[0]]
    rules = [("layers/self_attn/.*/kernel", None), *rules]
    stats = jq.calibrate(model.apply, params, [TOKENS], recipe=rules)
    qparams, report = jq.quantize_params(params, stats, rules)
    methods = {row.path.split("/")[-2]: row.method for row in report.layers if "experts" in row.path}
    assert methods == {"gate_proj": "RTN", "up_proj": "RTN", "down_proj": "AWQ"}  # a norm is read by all experts
    jq.save(tmp_path / "out", model, qparams, format="awq")
    want = model.apply(qparams, TOKENS)
    ours, read = jq.load_pretrained(tmp_path / "out")
    assert all(q.channel_scale is None for q in jax.tree.leaves(read, is_leaf=is_qtensor) if is_qtensor(q))
    found = ours.apply(read, TOKENS)  # scales that were divided are rounded to float16 again
    assert np.abs(found - want).max() < 1e-3 * np.abs(want).max()


def test_a_scale_without_a_place_is_refused(tmp_path):
    model, params = model_of("qwen2")
    stats = jq.calibrate(model.apply, params, [TOKENS])
    qparams, _ = jq.quantize_params(params, stats, model.recipe(jq.AWQ(jq.int4(group_size=32), grid=3)))
    with pytest.raises(ValueError, match=r"o_proj.*channel scale that cannot be folded away.*foldable=True"):
        jq.save(tmp_path / "out", model, qparams, format="compressed-tensors")
    assert not (tmp_path / "out").exists()
