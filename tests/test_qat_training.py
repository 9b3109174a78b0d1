"""Steps of training: what they change, what they leave, and where they stop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from functions import normal

from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.lsq import LSQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.spec import ActivationSpec, QuantSpec, int4
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.quantize import quantize_params
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.training.begin import start_from
from jaxquant.transforms.training.convert import convert
from jaxquant.transforms.training.distill import distillation_loss
from jaxquant.transforms.training.fake_quantized import fake_quantized
from jaxquant.transforms.training.optimizer import qat_optimizer
from jaxquant.transforms.training.steps import NotFinite, train, train_state, train_step

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax needs it


def net(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


PARAMS = {"up": normal(32, 64, seed=4), "down": normal(64, 16, seed=5)}
BATCHES = [normal(64, 32, seed=i) * 3 for i in range(8)]
RECIPES = {
    "up": LSQ(QuantSpec(bits=3, group_size=8, symmetric=False)),
    "down": RTN(QuantSpec(bits=4, activations=ActivationSpec(static=True, symmetric=False))),
}
RECIPE = list(RECIPES.items())
STEPS = 120


def loss(y, x, teacher):
    return jnp.mean((y - net(teacher, x)) ** 2)


@pytest.fixture(scope="module")
def setup():
    fn = fake_quantized(net, RECIPE)
    rate = optax.cosine_decay_schedule(1e-3, STEPS)  # at a constant one, codes never settle
    optimizer = qat_optimizer(optax.adamw(rate, weight_decay=0.01), ranges=rate)
    return fn, optimizer, train_step(fn, loss, optimizer), train_state(fn, PARAMS, optimizer, BATCHES[0])


def fresh(state):
    return jax.tree.map(jnp.array, state)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_it_learns_and_is_converted(setup):
    fn, _, step, start = setup
    losses = []
    state = train(step, fresh(start), BATCHES * (STEPS // 8), PARAMS, watch=lambda _, value: losses.append(value))
    assert np.mean(losses[-8:]) < 0.65 * np.mean(losses[:8])
    assert int(state.qat.step) == len(losses) == STEPS
    assert not np.array_equal(state.qat.ranges["up"]["scale"], start.qat.ranges["up"]["scale"])
    qparams = convert(state.params, state.qat, RECIPE)
    want, _ = fn.apply(state.params, state.qat, BATCHES[0])
    np.testing.assert_allclose(quantized(net)(qparams, BATCHES[0]), want, atol=2e-5)


@pytest.fixture(scope="module")
def compensated():
    """States of trainings with learned ranges, and what GPTQ makes of the same weights: zero points, and a clip."""
    specs = {"up": QuantSpec(bits=3, group_size=8, symmetric=False), "down": int4()}
    recipe = [(path, LSQ(spec)) for path, spec in specs.items()]
    methods = [(path, GPTQ(spec, clip="mse", refine=1)) for path, spec in specs.items()]
    qparams, _ = quantize_params(PARAMS, calibrate(net, PARAMS, BATCHES), methods)
    fn, optimizer = fake_quantized(net, recipe), qat_optimizer(optax.sgd(0.0), ranges=0.0)
    state = train_state(fn, PARAMS, optimizer, BATCHES[0])
    return train_step(fn, loss, optimizer), recipe, state, qparams


def test_a_training_begins_with_what_another_method_has_quantized(compensated):
    step, recipe, state, qparams = compensated
    begun = start_from(state, qparams)
    assert jax.tree.map(jax.typeof, begun) == jax.tree.map(jax.typeof, state)
    for path, q in qparams.items():  # only those move that would be rounded to another code, or nearly so
        scale, zero = (np.repeat(a, len(PARAMS[path]) // len(a), 0) for a in (q.scale, q.unsigned_zero_point))
        place = PARAMS[path] / scale + zero - q.unsigned_codes
        stays = np.abs(place) < 0.39
        assert 0.4 < np.mean(stays) < 0.95
        np.testing.assert_allclose(begun.params[path][stays], PARAMS[path][stays], rtol=1e-5)
    state, _ = step(fresh(begun), BATCHES[0], PARAMS)
    jax.tree.map(np.testing.assert_array_equal, convert(state.params, state.qat, recipe), qparams)


def test_a_training_does_not_begin_with_what_it_cannot_stand_for(compensated):
    _, _, state, qparams = compensated
    with pytest.raises(ValueError, match=r"'up' is QuantSpec\(bits=4.* and is trained as QuantSpec\(bits=3"):
        start_from(state, qparams | {"up": qparams["down"]})
    with pytest.raises(ValueError, match="'down' is trained with rounded numbers, and is not quantized"):
        start_from(state, qparams | {"down": PARAMS["down"]})
    scaled = dataclasses.replace(qparams["down"], channel_scale=jnp.ones((64, 1)))
    with pytest.raises(ValueError, match="'down' has channel_scale"):
        start_from(state, qparams | {"down": scaled})
    extremes = train_state(fake_quantized(net, RTN(int4())), PARAMS, qat_optimizer(optax.sgd(0.0)), BATCHES[0])
    with pytest.raises(ValueError, match="'down' is trained with the extremes as its range"):
        start_from(extremes, qparams)
    late = dataclasses.replace(state, qat=dataclasses.replace(state.qat, step=jnp.int32(2)))
    with pytest.raises(ValueError, match="step=2: the training has begun"):
        start_from(late, qparams)


def test_a_restored_training_takes_the_very_same_next_step(setup, tmp_path):
    _, _, step, start = setup
    middle = train(step, fresh(start), BATCHES[:3], PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", middle)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(fresh, start))
    assert_equal(restored, middle)
    assert restored.qat.weights == middle.qat.weights
    assert_equal(train(step, restored, BATCHES[3:5], PARAMS), train(step, middle, BATCHES[3:5], PARAMS))


def test_ranges_have_their_own_rate_and_no_decay(setup):
    fn, *_ = setup
    optimizer = qat_optimizer(optax.adamw(0.0, weight_decay=1.0), ranges=0.5, rules=[("params/down", None)])
    start = train_state(fn, PARAMS, optimizer, BATCHES[0])
    tree = {"params": start.params, "ranges": start.qat.ranges}
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, tree), start.optimizer, tree)
    np.testing.assert_allclose(updates["ranges"]["up"]["scale"], -0.5, rtol=1e-5)
    assert not np.any(updates["params"]["down"])
    decaying = qat_optimizer(optax.adamw(1.0, weight_decay=1.0), ranges=0.0)
    updates, _ = decaying.update(jax.tree.map(jnp.zeros_like, tree), decaying.init(tree), tree)
    np.testing.assert_allclose(updates["params"]["up"], -start.params["up"], rtol=1e-5)
    assert not np.any(updates["ranges"]["up"]["scale"])


@pytest.mark.parametrize(
    ("options", "recipe", "message"),
    [
        ({"ranges": 1e-3}, RTN(int4()), "of which there are none; use jq.LSQ"),
        ({}, LSQ(int4()), "learned ranges without a learning rate"),
        (
            {"rules": [("params/out", 1.0)]},
            RTN(int4()),
            r"rule \('params/out', 1.0\) matches no parameter; there are par",
        ),
    ],
)
def test_rates_of_parameters_that_do_not_exist_are_refused(options, recipe, message):
    with pytest.raises(ValueError, match=message):
        train_state(fake_quantized(net, recipe), PARAMS, qat_optimizer(optax.sgd(1.0), **options), BATCHES[0])
    with pytest.raises(ValueError, match="no regular expression"):
        qat_optimizer(optax.sgd(1.0), rules=[("(", 1.0)])


def test_a_training_stops_at_the_last_good_state(setup):
    _, _, step, start = setup
    good = train(step, fresh(start), BATCHES[:2], PARAMS)
    bad = [BATCHES[2].at[0, 0].set(jnp.nan), BATCHES[3]]
    with pytest.raises(NotFinite, match=r"step 2: the loss is nan; lower the learning rate") as caught:
        train(step, fresh(good), bad, PARAMS)
    assert caught.value.step == 2
    assert_equal(caught.value.state, good)


def test_a_gradient_that_is_not_finite_is_named():
    fn, optimizer = fake_quantized(net, RTN(int4())), qat_optimizer(optax.sgd(0.1))
    step = train_step(fn, lambda y, x: jnp.sum(jnp.sqrt(jnp.abs(y - jax.lax.stop_gradient(y)))), optimizer)
    start = train_state(fn, PARAMS, optimizer, BATCHES[0])
    with pytest.raises(NotFinite, match=r"step 0: 'params/down': .* entries of its gradient are not finite"):
        train(step, start, BATCHES[:1])


def test_an_update_that_is_not_finite_is_not_made():
    """Adam divides by a square root that float16 rounds to zero."""
    fn, optimizer = fake_quantized(net, RTN(int4())), qat_optimizer(optax.adam(1e-3))
    half = jax.tree.map(lambda a: a.astype("float16"), PARAMS)
    start = train_state(fn, half, optimizer, BATCHES[0])
    step = train_step(fn, lambda y, x: 1e-5 * jnp.mean(y), optimizer)
    with pytest.raises(
        NotFinite, match=r"step 0: 'params/.*would not be finite after it; .* train in float32"
    ) as caught:
        train(step, start, BATCHES[:1])
    assert_equal(caught.value.state.params, half)


def test_distillation_is_the_divergence_from_the_teacher():
    a, b = normal(3, 5, 7), normal(3, 5, 7, seed=1)
    p, q = (np.exp(np.asarray(x, np.float64)) for x in (b, a))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    each = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(distillation_loss(a, b), each.mean(), rtol=1e-4)
    mask = np.arange(15).reshape(3, 5) % 3 == 0
    np.testing.assert_allclose(distillation_loss(a, b, jnp.asarray(mask)), each[mask].mean(), rtol=1e-4)
    warm = distillation_loss(4 * a, 4 * b, temperature=4.0)
    np.testing.assert_allclose(warm, 16 * each.mean(), rtol=1e-4)
    assert not np.any(jax.grad(lambda b: distillation_loss(a, b))(b))
    with pytest.raises(ValueError, match=r"logits\[3, 5, 7\], teacher\[5, 7\] do not fit"):
        distillation_loss(a, b[0])
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        distillation_loss(a, b, temperature=0)
