"""Learned and observed ranges, schedules, and what becomes of them when they are converted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_same
from functions import CASES, normal
from jax import lax
from meshes import P, mesh_of

import jaxquant as jq
from jaxquant.methods.lsq import LSQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.affine import dequantize, fake_quantize, quantize
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import ActivationSpec, QuantSpec, int4, int8
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.training.convert import convert
from jaxquant.transforms.training.fake_quantized import fake_quantized
from jaxquant.transforms.training.schedule import MovingAverage, Schedule

STATIC = ActivationSpec(static=True)
ZERO = ActivationSpec(static=True, symmetric=False)
DYNAMIC = ActivationSpec(symmetric=False)
RECIPES = {
    "rtn": RTN(int4(group_size=8, symmetric=False, activations=DYNAMIC)),
    "rtn, static": RTN(int8(activations=ZERO)),
    "lsq": LSQ(int4(group_size=8)),
    "lsq, zero points, static": LSQ(int4(group_size=8, symmetric=False, activations=ZERO)),
    "lsq, static": LSQ(QuantSpec(bits=3, granularity="per_tensor", scale_dtype="bfloat16", activations=STATIC)),
}
FUNCTIONS = {
    "scan": list(RECIPES),
    "experts_ragged": ["rtn, static", "lsq, zero points, static"],
    "take_layers": ["lsq, static"],
    "heads_in_another_order": ["lsq, zero points, static"],
}


def moved(tree, size=0.01):
    """The tree, as after a step of training."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda a: a * (1 + size * jnp.asarray(rng.normal(size=a.shape), a.dtype)), tree)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_converted_outputs_are_those_it_was_trained_with(name):
    case = CASES[name]
    first, second = case.batches()
    for label in FUNCTIONS[name]:
        run, params = fake_quantized(case.apply, RECIPES[label]), case.params()
        state = run.init(params, first)
        _, state = run.apply(params, state, first)
        state = dataclasses.replace(state, ranges=moved(state.ranges))
        want, _ = run.apply(params, state, second)
        qparams = convert(params, state, RECIPES[label])
        for q in filter(is_qtensor, jax.tree.leaves(qparams, is_leaf=is_qtensor)):
            q.validate()
        assert_same(quantized(case.apply)(qparams, second), want)


HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}


FORMATS = {  # all but bitsandbytes, whose readers round inputs in another way than any training here
    "lsq": (LSQ(int4(group_size=16, scale_dtype="float16")), ("jaxquant", "compressed-tensors", "orbax", "gptq")),
    "rtn, static": (RECIPES["rtn, static"], ("jaxquant", "compressed-tensors", "orbax")),
    "lsq, zero points": (LSQ(int4(symmetric=False, scale_dtype="float16")), ("gptq", "awq")),
}


@pytest.mark.parametrize("label", FORMATS)
def test_a_converted_model_is_saved_in_every_format(label, tmp_path):
    config, formats = FORMATS[label]
    model = jq.Model.from_hf(HF)
    params, recipe = model.init(jax.random.key(0)), model.recipe(config)
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    run = fake_quantized(model.apply, recipe)
    want, state = run.apply(params, run.init(params, tokens), tokens)
    qparams = convert(params, dataclasses.replace(state, observed=run.init(params, tokens).observed), recipe)
    for kind in formats:
        jq.save(tmp_path / kind, model, qparams, format=kind)
        again, loaded = jq.load_pretrained(tmp_path / kind)
        assert_same(again.apply(loaded, tokens), want)


# ------------------------------------------------------------------------------------------------------------------ LSQ


def lsq_by_hand(x, scale, zero, bits, cotangent, count):
    """What x stands for, and the gradients of x and (one for all of x) of the scale and the zero point, by the papers'
    formulas with a range that passes half a step beyond the codes."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps, share = x / scale + zero, 1 / np.sqrt(count * high)
    codes = np.clip(np.round(x / scale) + zero, low, high)
    inside = (steps >= low - 0.5) & (steps <= high + 0.5)
    of_scale = np.where(inside, codes - steps, codes - zero)
    of_zero = np.where(inside, 0, -scale)
    return (codes - zero) * scale, cotangent * inside, share * cotangent * of_scale, share * cotangent * of_zero


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_papers(symmetric, float64):
    rng = np.random.default_rng(0)
    w, x, g = rng.normal(size=(6, 5)), rng.normal(size=(4, 6)), rng.normal(size=(4, 5))
    activations = ActivationSpec(bits=4, static=True, symmetric=symmetric)
    run = fake_quantized(lambda p, x: x @ p["w"], LSQ(QuantSpec(bits=3, symmetric=symmetric, activations=activations)))
    state = run.init({"w": jnp.asarray(w)}, jnp.asarray(x))
    ranges = {"w": {k: a * (0.3 if "scale" in k else 1) for k, a in state.ranges["w"].items()}}  # some are clipped

    def loss(w, ranges, x):
        y, _ = run.apply({"w": w}, dataclasses.replace(state, ranges=ranges), x)
        return jnp.sum(jnp.asarray(g) * y)

    of_w, of_ranges, of_x = jax.grad(loss, (0, 1, 2))(jnp.asarray(w), ranges, jnp.asarray(x))
    own = {k: np.asarray(a) for k, a in ranges["w"].items()}
    zeros = {k: own.get(k, np.zeros(())) for k in ("zero_point", "input_zero_point")}
    w_args = w, own["scale"], zeros["zero_point"], 3
    x_args = x, own["input_scale"], zeros["input_zero_point"], 4
    w_hat, x_hat = lsq_by_hand(*w_args, 0, 1)[0], lsq_by_hand(*x_args, 0, 1)[0]
    _, want_w, want_scale, want_zero = lsq_by_hand(*w_args, x_hat.T @ g, 6)
    _, want_x, want_input, want_input_zero = lsq_by_hand(*x_args, g @ w_hat.T, 6)
    assert np.any(want_w == 0)
    np.testing.assert_allclose(of_w, want_w, rtol=1e-9)
    np.testing.assert_allclose(of_x, want_x, rtol=1e-9)
    np.testing.assert_allclose(of_ranges["w"]["scale"], want_scale.sum(0, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(of_ranges["w"]["input_scale"], want_input.sum(), rtol=1e-9)
    if not symmetric:
        assert np.any(want_zero != 0)
        np.testing.assert_allclose(of_ranges["w"]["zero_point"], want_zero.sum(0, keepdims=True), rtol=1e-9)
        np.testing.assert_allclose(of_ranges["w"]["input_zero_point"], want_input_zero.sum(), rtol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-9, -1e-30])
@pytest.mark.parametrize("scale_dtype", [None, "bfloat16", "float16"])
def test_a_learned_scale_that_comes_next_to_zero_keeps_gradients_finite(scale, scale_dtype):
    w, x = normal(8, 3), normal(4, 8)
    run = fake_quantized(lambda p, x: x @ p["w"], LSQ(int4(scale_dtype=scale_dtype)))
    state = run.init({"w": w}, x)
    near = dataclasses.replace(state, ranges={"w": {"scale": state.ranges["w"]["scale"].at[0, 1].set(scale)}})
    found = jax.grad(lambda w, state: jnp.sum(run.apply({"w": w}, state, x)[0] ** 2), (0, 1), allow_int=True)(w, near)
    assert np.all(np.isfinite(found[0]))
    assert np.all(np.isfinite(found[1].ranges["w"]["scale"]))


@pytest.mark.parametrize(
    ("options", "shape", "count"),
    [
        ({"group_size": 3}, (2, 2, 1, 5), 3),
        ({}, (2, 1, 1, 5), 6),
        ({"granularity": "per_tensor"}, (2, 1, 1, 1), 30),
    ],
    ids=["groups", "channels", "tensor"],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_shared_ranges_of_stacked_layers(options, shape, count, symmetric, float64):
    rng = np.random.default_rng(4)
    w, x, g = rng.normal(size=(2, 6, 5)), rng.normal(size=(2, 4, 6)), rng.normal(size=(2, 4, 5))
    stacked = lambda p, x: lax.scan(lambda _, wx: (None, wx[1] @ wx[0]), None, (p["w"], x))[1]  # noqa: E731
    run = fake_quantized(stacked, LSQ(QuantSpec(bits=3, symmetric=symmetric, **options)))
    state = run.init({"w": jnp.asarray(w)}, jnp.asarray(x))
    ranges = {"w": {k: a * (0.6 if k == "scale" else 1) for k, a in state.ranges["w"].items()}}

    def loss(ranges):
        y, _ = run.apply({"w": jnp.asarray(w)}, dataclasses.replace(state, ranges=ranges), jnp.asarray(x))
        return jnp.sum(jnp.asarray(g) * y)

    got = jax.grad(loss)(ranges)["w"]
    own = {k: np.asarray(a).reshape(shape) for k, a in ranges["w"].items()}
    by_group = lambda a: a.reshape(2, shape[1], -1, 5)  # noqa: E731
    cotangent = by_group(np.swapaxes(x, 1, 2) @ g)
    found = lsq_by_hand(by_group(w), own["scale"], own.get("zero_point", 0), 3, cotangent, count)
    shared = (2,) if shape[-1] == 5 else (1, 2, 3)
    for name, want in zip(("scale", "zero_point"), found[2:], strict=True):
        if name in got:
            np.testing.assert_allclose(got[name].ravel(), want.sum(shared).ravel(), rtol=1e-9)


def of_least_squares(w):
    """Of ranges between the extremes of each column, whole and smaller: the best scale and zero point of 4 bits."""
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    tried = []
    for share in 1 - np.arange(32) * 0.6 / 32:
        scale = share * (high - low) / 15
        zero = np.clip(np.round(-8 - share * low / scale), -8, 7)
        codes = np.clip(np.round(w / scale) + zero, -8, 7)
        tried.append((np.sum(((codes - zero) * scale - w) ** 2, 0), scale, zero))
    errors, scales, zeros = (np.stack(a) for a in zip(*tried, strict=True))
    best = errors.argmin(0), np.arange(w.shape[1])
    return scales[best], zeros[best]


def test_ranges_start_where_the_papers_say():
    w, x = normal(16, 4), normal(5, 3, 16)
    product = lambda p, x: x @ p["w"]  # noqa: E731
    spec = int4(group_size=8, activations=STATIC)
    ranges = fake_quantized(product, LSQ(spec)).init({"w": w}, x).ranges["w"]
    mean = np.abs(np.asarray(w)).reshape(2, 8, 4).mean(1)
    np.testing.assert_allclose(ranges["scale"], 2 * mean / np.sqrt(7), rtol=1e-6)
    np.testing.assert_allclose(LSQ(spec).quantize(w)[0].scale, ranges["scale"], rtol=1e-6)
    flat = jnp.where(x > 0, 0.7, -0.7)  # whichever tokens are held out, the mean is this
    ranges = fake_quantized(product, LSQ(spec)).init({"w": w}, flat).ranges["w"]
    np.testing.assert_allclose(ranges["input_scale"], 2 * 0.7 / np.sqrt(127), rtol=1e-5)
    tensor = QuantSpec(bits=4, granularity="per_tensor")
    scale = fake_quantized(product, LSQ(tensor)).init({"w": w}, x).ranges["w"]["scale"]
    np.testing.assert_allclose(scale, [[2 * np.abs(w).mean() / np.sqrt(7)]], rtol=1e-5)
    spec = int4(symmetric=False, activations=ZERO)
    ranges = fake_quantized(product, LSQ(spec)).init({"w": w}, x).ranges["w"]
    scale, zero = of_least_squares(np.asarray(w, np.float64))
    assert np.any(scale < 0.99 * (w.max(0) - w.min(0)) / 15)
    np.testing.assert_allclose(ranges["scale"], scale[None], rtol=1e-5)
    np.testing.assert_array_equal(ranges["zero_point"], zero[None])
    np.testing.assert_allclose(ranges["input_scale"], (x.max() - x.min()) / 255, rtol=1e-6)
    np.testing.assert_allclose(ranges["input_zero_point"], np.round(-128 - x.min() / ranges["input_scale"]))


# ------------------------------------------------------------------------------------------------- ranges that are seen


def product(params, x):
    return x @ params["w"]


def test_static_ranges_follow_the_inputs_and_begin_late():
    recipe = RTN(int8(activations=ZERO))
    run, params = fake_quantized(product, recipe, observer=MovingAverage(0.9, start=2)), {"w": normal(16, 8)}
    batches = [normal(5, 16, seed=i) * (i + 1) for i in range(4)]
    state, low, high = run.init(params, batches[0]), batches[0].min(), batches[0].max()
    weights = dequantize(quantize(params["w"], int8()))
    assert state.settled == 2
    for i, x in enumerate(batches):
        y, state = run.apply(params, state, x)
        scale = (high - low) / 255
        zero = jnp.round(-128 - low / scale)
        rounded = (jnp.clip(jnp.round(x / scale) + zero, -128, 127) - zero) * scale
        np.testing.assert_allclose(y, (x if i < 2 else rounded) @ weights, atol=2e-5)
        low, high = 0.9 * low + 0.1 * x.min(), 0.9 * high + 0.1 * x.max()
        np.testing.assert_allclose(state.observed["w"]["lowest"], low, rtol=1e-5)
        np.testing.assert_allclose(state.observed["w"]["highest"], high, rtol=1e-5)
    assert state.step == 4


def test_layers_and_experts_have_ranges_of_their_own():
    case = CASES["experts_ragged"]
    run, params, (first, second) = fake_quantized(case.apply, RECIPES["rtn, static"]), case.params(), case.batches()
    state = run.init(params, first)
    seen = state.observed["up"]["seen"]
    assert seen.shape == (4,)
    assert seen[-1] == 0  # this expert has no token
    assert len(set(np.asarray(state.observed["up"]["highest"])[:3].tolist())) == 3
    assert jnp.all(jnp.isfinite(run.apply(params, state, second)[0]))


# ------------------------------------------------------------------------------------------------------------ schedules


def test_rounding_starts_late_and_is_annealed():
    spec, w, x = QuantSpec(bits=2), {"w": normal(16, 8)}, normal(5, 16)
    run = fake_quantized(product, RTN(spec), schedule=Schedule(start=2, anneal=4))
    state = run.init(w, x)
    rounded = fake_quantize(w["w"], spec)
    for i, share in enumerate([0, 0, 0, 0.25, 0.5, 0.75, 1, 1]):
        y, state = run.apply(w, state, x)
        np.testing.assert_allclose(y, x @ (w["w"] + share * (rounded - w["w"])), atol=1e-5, err_msg=f"step {i}")
    assert state.settled == 6
    np.testing.assert_array_equal(y, x @ rounded)
    np.testing.assert_array_equal(run(w, x), x @ rounded)


@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_fall_step_by_step(symmetric):
    schedule = Schedule(bits=[(1, 8), (2, 4)])
    spec, w, x = QuantSpec(bits=3, symmetric=symmetric), {"w": normal(16, 8)}, normal(5, 16)
    run, learned = (fake_quantized(product, make(spec), schedule=schedule) for make in (RTN, LSQ))
    state, other = run.init(w, x), learned.init(w, x)
    own = {k: np.asarray(a) for k, a in other.ranges["w"].items()}
    for bits in (8, 4, 3, 3):
        y, state = run.apply(w, state, x)
        want = x @ fake_quantize(w["w"], dataclasses.replace(spec, bits=bits))
        np.testing.assert_allclose(y, want, atol=1e-5, err_msg=f"{bits} bits")
        y, other = learned.apply(w, other, x)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        finer = (high - low) / 7  # the learned range stays, and more codes divide it
        zero = 0 if symmetric else np.round(low + (own["zero_point"] + 4) * finer)
        codes = np.clip(np.round(np.asarray(w["w"]) / (own["scale"] / finer)) + zero, low, high)
        want = np.asarray(x) @ ((codes - zero) * own["scale"] / finer)
        np.testing.assert_allclose(y, want, atol=1e-4, err_msg=f"{bits} bits, learned")


# ------------------------------------------------------------------------------------------------------------ bad input


def trained(recipe=None, **options):
    w, x = {"w": normal(16, 8)}, normal(5, 16)
    run = fake_quantized(product, recipe or LSQ(int4()), **options)
    return w, run.apply(w, run.init(w, x), x)[1]


def test_conversion_of_what_is_not_trained_is_refused():
    recipe, (w, state) = LSQ(int4()), trained()
    with pytest.raises(ValueError, match=r"state.step=0: no step of training"):
        convert(w, fake_quantized(product, recipe).init(w, normal(5, 16)), recipe)
    with pytest.raises(ValueError, match="step=1, but rounding changes until step 5"):
        convert(w, trained(schedule=Schedule(start=5))[1], recipe)
    with pytest.raises(ValueError, match=r"'w' was trained as LSQ.* and is given RTN"):
        convert(w, state, RTN(int4()))
    with pytest.raises(ValueError, match="the parameters have no 'w'"):
        convert({"v": w["w"]}, state, recipe)
    with pytest.raises(ValueError, match="'w': 1 of its weights are not finite"):
        convert({"w": w["w"].at[0, 0].set(jnp.nan)}, state, recipe)
    broken = {"w": {"scale": state.ranges["w"]["scale"].at[0, 0].set(jnp.inf)}}
    with pytest.raises(ValueError, match="'w': 1 of its scale are not finite"):
        convert(w, dataclasses.replace(state, ranges=broken), recipe)


def test_a_state_of_another_recipe_is_refused():
    w, state = trained()
    with pytest.raises(ValueError, match="the state is of another recipe"):
        fake_quantized(product, RTN(int4())).apply(w, state, normal(5, 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(start=-1), "start=-1 must be a whole number"),
        (lambda: Schedule(anneal=1.5), "anneal=1.5 must be a whole number"),
        (lambda: Schedule(bits=[(5, 4), (3, 8)]), r"bits=\(\(5, 4\), \(3, 8\)\) must be pairs"),
        (lambda: Schedule(bits=[(5, 9)]), "2 to 8 bits"),
        (lambda: MovingAverage(decay=1.0), "decay=1.0 must be"),
        (lambda: MovingAverage(start=True), "start=True must be a whole number"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_learned_ranges_inside_of_shard_map():
    """Each device takes the part of the ranges that belongs to its experts."""
    mesh = mesh_of(data=2, model=4)

    def fn(params, x):
        inner = lambda w, x: jnp.einsum("etk,ekn->etn", x, w)  # noqa: E731
        return jax.shard_map(inner, mesh=mesh, in_specs=(P("model"), P("model")), out_specs=P("model"))(params["w"], x)

    params, x = {"w": normal(4, 16, 8)}, normal(4, 5, 16)
    run = fake_quantized(fn, LSQ(int4(activations=ZERO)))
    state = run.init(params, x)
    assert state.ranges["w"]["input_scale"].shape == (4,)
    _, state = run.apply(params, state, x)
    gradient = jax.grad(lambda r: jnp.sum(jnp.sin(run.apply(params, dataclasses.replace(state, ranges=r), x)[0])))
    assert len(set(np.asarray(gradient(state.ranges)["w"]["input_scale"]).tolist())) == 4
    qparams = convert(params, state, LSQ(int4(activations=ZERO)))
    want = jnp.stack(
        [quantized(product)({"w": jax.tree.map(lambda a, e=e: a[e], qparams["w"])}, x[e]) for e in range(4)]
    )
    assert_same(run.apply(params, state, x)[0], want)
