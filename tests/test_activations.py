"""Rounded inputs of products, against float64 NumPy written from the formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import correlated, statistics_of, weights

import jaxquant as jq
from jaxquant.kernels.matmul import quantized_matmul, quantized_ragged_matmul
from jaxquant.numerics.activations import choose_static
from jaxquant.numerics.affine import dequantize

K, N = 48, 20
DYNAMIC = {
    "per token": jq.ActivationSpec(),
    "per token, 4 bits": jq.ActivationSpec(bits=4),
    "per token, asymmetric": jq.ActivationSpec(symmetric=False),
    "per tensor": jq.ActivationSpec(granularity="per_tensor"),
}


def rounded(x, activations, scale=None):
    """x after quantizing and dequantizing, in float64. Extremes lie half way between codes, so quotients are products
    with reciprocals, as they are defined."""
    low, high = -(2 ** (activations.bits - 1)), 2 ** (activations.bits - 1) - 1
    axis = -1 if activations.granularity == "per_token" else (-2, -1)
    smallest, largest = np.minimum(x.min(axis, keepdims=True), 0), np.maximum(x.max(axis, keepdims=True), 0)
    zero = 0.0
    if scale is None and activations.symmetric:
        scale = np.maximum(-smallest, largest) * (2 / (high - low))
    elif scale is None:
        scale = (largest - smallest) / 2 * (2 / (high - low))
        zero = np.clip(np.round(low - smallest * (1 / scale)), low, high)
    return (np.clip(np.round(x * (1 / scale)) + zero, low, high) - zero) * scale


def static(q, scale, zero=None):
    """A QTensor of one matrix with a static scale, and zero point, for its inputs."""
    spec = dataclasses.replace(q.spec, activations=jq.ActivationSpec(static=True, symmetric=zero is None))
    q = dataclasses.replace(q, spec=spec, input_scale=jnp.full((1, 1), scale, q.scale.dtype))
    q = dataclasses.replace(q, input_zero_point=None if zero is None else jnp.full((1, 1), zero, jnp.int8))
    q.validate()
    return q


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_ranges_are_those_of_the_input(name):
    x, w = correlated(K, 30, np.float64), weights(K, N, dtype=np.float64)
    q = jq.quantize(jnp.asarray(w), jq.int8(activations=DYNAMIC[name]))
    found = quantized_matmul(jnp.asarray(x), q)
    np.testing.assert_allclose(found, rounded(x, DYNAMIC[name]) @ np.asarray(dequantize(q)), rtol=1e-12, atol=1e-12)
    plain = quantized_matmul(jnp.asarray(x), jq.quantize(jnp.asarray(w), jq.int8()))
    assert np.abs(found - plain).max() > 1e-4


def test_each_granularity_gives_a_different_error():
    x = correlated(K, 30) * np.geomspace(1, 100, 30, dtype=np.float32)[:, None]
    w = jnp.asarray(weights(K, N))
    exact = x @ np.asarray(dequantize(jq.quantize(w, jq.int8())))
    errors = {}
    for name, activations in DYNAMIC.items():
        found = quantized_matmul(jnp.asarray(x), jq.quantize(w, jq.int8(activations=activations)))
        errors[name] = np.linalg.norm((found - exact) / np.linalg.norm(x, axis=1, keepdims=True))
    assert errors["per tensor"] > 3 * errors["per token"]
    assert errors["per token, 4 bits"] > 8 * errors["per token"]


@pytest.mark.usefixtures("float64")
def test_a_static_range_clips():
    x = np.linspace(-3, 3, 4 * K).reshape(4, K)
    q = static(jq.quantize(jnp.asarray(weights(K, N, dtype=np.float64)), jq.int8()), 0.01)
    expected = rounded(x, jq.ActivationSpec(static=True), 0.01)
    assert np.abs(expected).max() == 1.28
    np.testing.assert_allclose(quantized_matmul(jnp.asarray(x), q), expected @ np.asarray(dequantize(q)), rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_derivatives_are_straight_through_and_stop_beyond_a_static_range():
    x = jnp.linspace(-3, 3, 4 * K).reshape(4, K)
    w = jnp.asarray(weights(K, N, dtype=np.float64))
    dynamic = jq.quantize(w, jq.int8(activations=jq.ActivationSpec()))
    out, pull = jax.vjp(lambda x: quantized_matmul(x, dynamic), x)
    g = jnp.asarray(weights(*out.shape, dtype=np.float64, seed=3))
    through = g @ dequantize(dynamic).T
    moved = np.asarray(pull(g)[0] - through)  # what flows through the scale arrives at each row's extreme
    assert np.count_nonzero(np.abs(moved) > 1e-9, axis=1).max() <= 2
    q = static(dynamic, 0.01)
    inside = (x >= -1.285) & (x <= 1.275)
    np.testing.assert_allclose(
        jax.grad(lambda x: jnp.sum(g * quantized_matmul(x, q)))(x), jnp.where(inside, through, 0), rtol=1e-9
    )


def test_stacked_and_ragged_products_have_the_scale_of_their_own_matrix():
    x, w = correlated(K, 24), weights(3, K, N)
    scales = np.asarray([0.01, 0.02, 0.05], np.float32)
    one = [static(jq.quantize(jnp.asarray(w[i]), jq.int8()), scales[i]) for i in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *one)
    stack.validate()
    separate = np.stack([quantized_matmul(jnp.asarray(x), q) for q in one])
    together = quantized_matmul(jnp.broadcast_to(x, (3, *x.shape)), stack)
    np.testing.assert_allclose(together, separate, rtol=1e-4, atol=1e-4)
    ragged = quantized_ragged_matmul(jnp.asarray(x), stack, jnp.asarray([5, 12, 7]))
    expected = np.concatenate([separate[0, :5], separate[1, 5:17], separate[2, 17:]])
    np.testing.assert_allclose(ragged, expected, rtol=1e-4, atol=1e-4)


def layers(params, x):
    """A scan over stacked layers, and a head."""

    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


def model():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"layers": jax.random.normal(keys[0], (3, K, K)) / 5, "head": jax.random.normal(keys[1], (K, N)) / 5}
    return params, 4 * jax.random.normal(keys[2], (8, 40, K))


def test_static_scales_come_from_calibration():
    """The scale is the largest input of each layer over 127.5, tokens included that are held out of the means."""
    params, x = model()
    stats = jq.calibrate(layers, params, [x])
    config = jq.RTN(jq.int8(activations=jq.ActivationSpec(static=True)))
    qparams, report = jq.quantize_params(params, stats, config)
    largest, inputs = [], x
    for w in params["layers"]:
        largest.append(float(jnp.abs(inputs).max()))
        inputs = jnp.tanh(inputs @ w)
    largest = np.asarray(largest)
    assert largest[0] > 2 * largest[1]
    np.testing.assert_allclose(qparams["layers"].input_scale.reshape(-1), largest / 127.5, rtol=1e-5)
    assert qparams["head"].input_scale.shape == (1, 1)
    qparams["layers"].validate()
    assert {layer.activations for layer in report.layers} == {"static"}
    hidden = np.asarray(x, np.float64).reshape(-1, K)
    for i in range(3):
        scale = np.float64(qparams["layers"].input_scale[i, 0, 0])
        w = np.asarray(dequantize(qparams["layers"])[i], np.float64)
        hidden = np.tanh(rounded(hidden, config.spec.activations, scale) @ w)
    scale = np.float64(qparams["head"].input_scale[0, 0])
    hidden = rounded(hidden, config.spec.activations, scale) @ np.asarray(dequantize(qparams["head"]), np.float64)
    found = np.asarray(jq.quantized(layers)(qparams, x)).reshape(-1, N)
    assert np.median(np.abs(found - hidden)) < 1e-6  # a few inputs on the edge between two codes take the other one
    assert np.linalg.norm(found - hidden) < 1e-3 * np.linalg.norm(hidden)


@pytest.mark.parametrize("kind", ["absmax", "percentile", "mse"])
def test_static_ranges_cover_what_they_say(kind):
    """One large input in a sample of 128 rows, all of which are held out and kept."""
    x = weights(128, K)
    x[5, 7] = 8 * np.abs(x).max()
    stats, spec = statistics_of(x), jq.int8(activations=jq.ActivationSpec(static=True, range=kind, bits=4))
    scale = float(choose_static(stats, spec, jnp.float32)[0][0, 0])
    reaches = np.abs(x).max() * (1 - np.arange(50) / 50)
    errors = [np.sum((rounded(x.astype(np.float64), spec.activations, np.float64(r / 7.5)) - x) ** 2) for r in reaches]
    want = {"absmax": np.abs(x).max(), "percentile": np.quantile(np.abs(x), 0.999), "mse": reaches[np.argmin(errors)]}
    assert scale == pytest.approx(want[kind] / 7.5, rel=1e-4)
    assert max(want["percentile"], want["mse"]) < 0.5 * want["absmax"]
    nothing = dataclasses.replace(stats, held_out=jnp.zeros_like(stats.held_out))
    assert float(choose_static(nothing, spec, jnp.float32)[0][0, 0]) == pytest.approx(want["absmax"] / 7.5, rel=1e-6)


@pytest.mark.parametrize("kind", ["absmax", "percentile", "mse"])
def test_asymmetric_static_ranges_reach_differently_far(kind):
    """Inputs of which few are negative, as those that an activation function leaves; one of 128 rows holds a large."""
    x = np.maximum(weights(128, K), -0.02)
    x[5, 7] = 8 * x.max()
    activations = jq.ActivationSpec(static=True, range=kind, bits=4, symmetric=False)
    scale, zero = choose_static(statistics_of(x), jq.int8(activations=activations), jnp.float32)

    def qparams(low, high):
        scale = (high - low) / 15
        return scale, np.clip(np.round(-8 - low / scale), -8, 7)

    def error(share):
        scale, zero = qparams(share * x.min(), share * x.max())
        return np.sum(((np.clip(np.round(x / scale) + zero, -8, 7) - zero) * scale - x) ** 2)

    shares = 1 - np.arange(50) / 50
    best = shares[np.argmin([error(np.float64(s)) for s in shares])]
    want = {
        "absmax": (x.min(), x.max()),
        "percentile": np.quantile(x, [0.0005, 0.9995]),
        "mse": (best * x.min(), best * x.max()),
    }[kind]
    assert (float(scale[0, 0]), int(zero[0, 0])) == pytest.approx(qparams(*want), rel=1e-4)
    assert int(zero[0, 0]) < -5  # nearly all codes are of positive numbers


def test_an_asymmetric_static_range_is_that_of_calibration():
    """And it costs less than a symmetric one where inputs are of one sign."""
    params, x = {"w": jnp.asarray(weights(K, N))}, jnp.abs(jnp.asarray(correlated(K, 64)))
    stats = jq.calibrate(lambda p, x: x @ p["w"], params, [x])
    inputs = stats.products["w"].inputs
    np.testing.assert_array_equal(inputs.lowest, 0)
    np.testing.assert_array_equal(inputs.highest, x.max(0))
    errors = {}
    for symmetric in (True, False):
        spec = jq.int8(activations=jq.ActivationSpec(static=True, bits=4, symmetric=symmetric))
        qparams, _ = jq.quantize_params(params, stats, jq.RTN(spec))
        qparams["w"].validate()
        found = jq.quantized(lambda p, x: x @ p["w"])(qparams, x)
        errors[symmetric] = np.linalg.norm(found - x @ dequantize(qparams["w"]))
    q = qparams["w"]
    assert (float(q.input_scale[0, 0]), int(q.input_zero_point[0, 0])) == (
        pytest.approx(float(x.max()) / 15, rel=1e-6),
        -8,
    )
    assert errors[False] < 0.7 * errors[True]


def test_an_expert_without_tokens_has_the_range_of_the_others():
    def experts(params, x):
        return jax.lax.ragged_dot(x, params["w"], jnp.asarray([20, 0, 44]))

    params = {"w": jnp.asarray(weights(3, K, N))}
    stats = jq.calibrate(experts, params, [jnp.asarray(correlated(K, 64))])
    config = jq.RTN(jq.int8(activations=jq.ActivationSpec(static=True)))
    scale = jq.quantize_params(params, stats, config)[0]["w"].input_scale.reshape(-1)
    assert scale[1] == max(scale[0], scale[2]) > min(scale[0], scale[2])
    none = dataclasses.replace(stats.products["w"].inputs, count=jnp.zeros(3))
    product = dataclasses.replace(stats.products["w"], inputs=none)
    with pytest.raises(ValueError, match="'w': its input saw no calibration token, so it has no static range"):
        jq.quantize_params(params, dataclasses.replace(stats, products={"w": product}), config)


@pytest.mark.parametrize("is_static", [False, True])
def test_reported_errors_include_the_rounded_inputs(is_static):
    params, x = model()
    stats = jq.calibrate(layers, params, [x])
    activations = jq.ActivationSpec(bits=4, static=is_static)
    qparams, report = jq.quantize_params(params, stats, jq.GPTQ(jq.int8(activations=activations)))
    held_out = np.asarray(stats.products["head"].inputs.held_out, np.float64)
    held_out = held_out[np.any(held_out != 0, axis=1)]
    w = np.asarray(params["head"], np.float64)
    scale = None
    if is_static:
        scale = np.asarray(stats.products["head"].inputs.absmax).max() / 7.5
    dense = np.asarray(dequantize(qparams["head"]), np.float64)
    difference = rounded(held_out, activations, scale) @ dense - held_out @ w
    expected = np.sum(difference**2) / np.sum((held_out @ w) ** 2)
    (found,) = (layer for layer in report.layers if layer.path == "head")
    assert found.error == pytest.approx(expected, rel=1e-3 if is_static else 0.05)  # the extreme of a row is a tie


def test_int8_weights_and_inputs_change_a_model_little():
    params, x = model()
    stats = jq.calibrate(layers, params, [x])
    exact = layers(params, x)
    for activations in (jq.ActivationSpec(), jq.ActivationSpec(static=True)):
        qparams, _ = jq.quantize_params(params, stats, jq.GPTQ(jq.int8(activations=activations)))
        found = jax.jit(jq.quantized(layers))(qparams, x)
        error = jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)
        assert 1e-3 < error < 0.03


def test_dynamic_ranges_need_no_statistics_and_static_ones_do():
    params, x = model()
    qparams, _ = jq.quantize_params(params, None, jq.RTN(jq.int8(activations=jq.ActivationSpec())))
    assert qparams["layers"].input_scale is None
    assert jnp.isfinite(jq.quantized(layers)(qparams, x)).all()
    with pytest.raises(ValueError, match="RTN with static activations needs calibration statistics"):
        jq.quantize_params(params, None, jq.RTN(jq.int8(activations=jq.ActivationSpec(static=True))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 9}, "bits=9 is not supported"),
        ({"granularity": "per_channel"}, "granularity='per_channel' of activations is neither"),
        ({"static": True, "granularity": "per_token"}, "a static range is per_tensor; leave out static=True"),
        ({"static": 1}, "static=1 must be True or False"),
        ({"static": True, "range": "max"}, "range='max' is not one of absmax, percentile, mse"),
        ({"range": "mse"}, "range='mse' is for static ranges"),
    ],
)
def test_bad_activation_specs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        jq.ActivationSpec(**fields)


def test_a_spec_takes_no_other_activations():
    with pytest.raises(ValueError, match="activations='dynamic' is neither an ActivationSpec nor None"):
        jq.int8(activations="dynamic")


def test_uses_that_have_no_range_are_refused():
    q = jq.quantize(jnp.asarray(weights(K, N)), jq.int8(activations=jq.ActivationSpec(static=True)))
    with pytest.raises(ValueError, match="static activations need a QTensor with an input_scale"):
        quantized_matmul(jnp.ones((2, K)), q)
    per_tensor = jq.int8(activations=jq.ActivationSpec(granularity="per_tensor"))
    experts = jq.quantize(jnp.asarray(weights(3, K, N)), per_tensor)
    with pytest.raises(ValueError, match="one for the rows of all experts; use per_token"):
        quantized_ragged_matmul(jnp.ones((6, K)), experts, jnp.asarray([2, 2, 2]))


def test_one_input_of_matrices_with_scales_of_their_own_is_refused_by_name():
    params, x = model()
    stats = jq.calibrate(layers, params, [x])
    config = jq.RTN(jq.int8(activations=jq.ActivationSpec(static=True)))
    qparams, _ = jq.quantize_params(params, stats, config)
    together = lambda params, x: jnp.einsum("tk,ckn->ctn", x, params["layers"])  # noqa: E731
    with pytest.raises(TypeError, match="'layers': its matrices have input scales of their own"):
        jq.quantized(together)(qparams, x[0])


def test_lookups_round_no_inputs():
    params = {"table": jnp.asarray(weights(30, K)), "w": jnp.asarray(weights(K, N))}
    stats = jq.calibrate(lambda p, ids: p["table"][ids] @ p["w"], params, [jnp.arange(30)])
    config = jq.RTN(jq.int8(activations=jq.ActivationSpec(static=True)))
    qparams, report = jq.quantize_params(params, stats, [(".*", config)])
    assert qparams["table"].spec == jq.int8()
    assert {layer.path: layer.activations for layer in report.layers} == {"table": "none", "w": "static"}


def test_the_native_format_keeps_activations(tmp_path):
    q = static(jq.quantize(jnp.asarray(weights(K, N)), jq.int4(group_size=16)), 0.25)
    dynamic = jq.quantize(jnp.asarray(weights(K, N)), jq.int8(activations=jq.ActivationSpec(symmetric=False)))
    asymmetric = static(jq.quantize(jnp.asarray(weights(K, N)), jq.int8()), 0.25, -100)
    jq.save(tmp_path / "tree", None, {"static": q, "dynamic": dynamic, "asymmetric": asymmetric})
    found = jq.load(tmp_path / "tree")
    assert found["asymmetric"].spec == asymmetric.spec
    assert found["asymmetric"].input_zero_point.tolist() == [[-100]]
    assert found["static"].spec == q.spec
    assert found["static"].input_scale.tolist() == [[0.25]]
    assert found["dynamic"].spec == dynamic.spec
    assert found["dynamic"].input_scale is None


def test_an_input_scale_must_fit_the_spec():
    q = static(jq.quantize(jnp.asarray(weights(K, N)), jq.int8()), 0.25)
    with pytest.raises(ValueError, match=r"static=True.*but input_scale is None"):
        dataclasses.replace(q, input_scale=None).validate()
    with pytest.raises(ValueError, match="input_scale is float32"):
        dataclasses.replace(q, input_scale=jnp.ones((2, 1))).validate()
    with pytest.raises(ValueError, match="but input_zero_point is"):
        dataclasses.replace(q, input_zero_point=jnp.zeros((1, 1), jnp.int8)).validate()
    q = static(q, 0.25, -100)
    with pytest.raises(ValueError, match=r"static=True.*but input_zero_point is None"):
        dataclasses.replace(q, input_zero_point=None).validate()
    with pytest.raises(ValueError, match="input_zero_point is float32"):
        dataclasses.replace(q, input_zero_point=jnp.zeros((1, 1))).validate()


def test_a_stored_zero_point_of_inputs_must_be_one_of_their_codes(tmp_path):
    q = static(jq.quantize(jnp.asarray(weights(K, N)), jq.int8()), 0.25, -100)
    spec = dataclasses.replace(q.spec, activations=dataclasses.replace(q.spec.activations, bits=4))
    jq.save(tmp_path / "tree", None, dataclasses.replace(q, spec=spec))
    with pytest.raises(ValueError, match="input_zero_point reach from -100 to -100"):
        jq.load(tmp_path / "tree")
