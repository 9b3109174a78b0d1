"""Dampened training: where a step leaves weights, and that they no longer go back and forth between codes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_same
from functions import normal
from jax.sharding import AxisType
from meshes import P, inputs, mesh_of, model, params_of, placed_params, put

from jaxquant.methods.lsq import LSQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.spec import QuantSpec, int4
from jaxquant.transforms.training.fake_quantized import fake_quantized
from jaxquant.transforms.training.optimizer import qat_optimizer
from jaxquant.transforms.training.schedule import Schedule
from jaxquant.transforms.training.steps import train, train_state, train_step

X = normal(64, 16, seed=1)
SPECS = {"up": QuantSpec(bits=4, group_size=4), "down": QuantSpec(bits=3, group_size=8, symmetric=False)}
PARAMS = {"up": normal(16, 32, seed=2), "down": normal(32, 8, seed=3), "free": jnp.ones(8)}


pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax needs it


def net(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] * params["free"]


def taken(rate, schedule=None, dampening=None, steps=1, **options):
    """The state after some steps of the net, and what the last one met."""
    recipe = [(path, LSQ(spec)) for path, spec in SPECS.items()]
    optimizer = qat_optimizer(optax.sgd(rate), ranges=1e-3, **options)
    fn = fake_quantized(net, recipe, schedule=schedule)
    step = train_step(fn, lambda y, x: jnp.mean(jnp.square(y - 1)), optimizer, dampening=dampening)
    state = train_state(fn, PARAMS, optimizer, X)
    for _ in range(steps):
        state, metrics = step(state, X)
    return state, metrics


def in_codes(w, ranges, spec):
    """The weight in steps of its scale, its code in those, and the scale, in float64."""
    zeros = np.zeros_like(ranges["scale"])
    scale, zero = (np.repeat(ranges.get(name, zeros), spec.group_size, 0) for name in ("scale", "zero_point"))
    scale, zero = np.asarray(scale, np.float64), np.asarray(zero, np.float64)
    low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
    place = np.asarray(w, np.float64) / np.abs(scale)
    zero = np.round(np.clip(zero, low, high))
    return place, np.clip(np.round(place) + zero, low, high) - zero, np.abs(scale)


def test_a_step_pulls_to_the_code_and_takes_up_a_new_one_in_the_middle():
    plain, _ = taken(3.0)
    found, _ = taken(3.0, dampening=lambda step: jnp.where(step == 0, 0.25, 1.0))
    assert_same(found.qat.ranges, plain.qat.ranges, 1e-6)
    np.testing.assert_allclose(found.params["free"], plain.params["free"], rtol=1e-6)
    for path, spec in SPECS.items():
        ranges = plain.qat.ranges[path]
        before, old, _ = in_codes(PARAMS[path], ranges, spec)
        place, code, scale = in_codes(plain.params[path], ranges, spec)
        assert 0.1 < np.mean(code != old) < 0.9
        want = np.where(code == old, place + 0.25 * (code - place), code) * scale
        still = np.asarray(plain.params[path] == PARAMS[path])  # far beyond the last code, where no gradient is
        assert np.any(still) == (not spec.symmetric)
        want = np.where(still, PARAMS[path], want)
        tie = np.any([np.abs(np.abs(a - np.round(a)) - 0.5) < 1e-4 for a in (before, place)], 0)  # to either side
        assert np.mean(tie) < 0.01
        np.testing.assert_allclose(np.asarray(found.params[path])[~tie], want[~tie], atol=1e-5)


def test_what_is_kept_as_it_is_is_not_pulled():
    found, _ = taken(3.0, dampening=0.25, rules=[("params/down", None)])
    np.testing.assert_array_equal(found.params["down"], PARAMS["down"])


def test_it_begins_where_the_schedule_ends():
    later = Schedule(start=2)
    assert_same(taken(3.0, later, 0.25, steps=2)[0].params, taken(3.0, later, steps=2)[0].params, 1e-6)
    found, plain = taken(3.0, later, 0.25, steps=3)[0].params["up"], taken(3.0, later, steps=3)[0].params["up"]
    assert np.mean(np.abs(found - plain) > 1e-3) > 0.5


def test_what_is_not_finite_gets_no_code():
    state, metrics = taken(np.inf, dampening=0.25)
    assert not metrics.finite
    np.testing.assert_array_equal(state.params["up"], PARAMS["up"])


def test_ranges_that_follow_the_weights_are_refused():
    fn, optimizer = fake_quantized(net, [("up", RTN(int4()))]), qat_optimizer(optax.sgd(1.0))
    step = train_step(fn, lambda y, x: jnp.mean(y), optimizer, dampening=0.1)
    with pytest.raises(ValueError, match=r"dampening: the range of 'up' is that of its own extremes.*use jq.LSQ"):
        step(train_state(fn, PARAMS, optimizer, X), X)


def changes(dampening):
    """How many weights change their code in each of the last 200 steps, and the mean loss of those.

    The best value of each weight lies between two codes.
    """
    config = LSQ(int4())
    fn, optimizer = fake_quantized(lambda params, x: x @ params["w"], config), qat_optimizer(optax.adam(2e-3), ranges=0)
    w = normal(16, 32, seed=4)
    step = train_step(fn, lambda y, x, w: jnp.mean(jnp.square(y - x @ w)), optimizer, dampening=dampening)
    seen, losses = [], []
    round_ = jax.jit(lambda params, state: fn.apply(params, state, jnp.eye(16))[0])
    state = train_state(fn, {"w": w}, optimizer, X)

    def watch(state, loss):
        seen.append(np.asarray(round_(state.params, state.qat)))
        losses.append(loss)

    train(step, state, [X] * 400, w, watch=watch)
    return np.mean([np.sum(np.abs(a - b) > 1e-4) for a, b in itertools.pairwise(seen[200:])]), np.mean(losses[200:])


def test_weights_between_two_codes_no_longer_go_back_and_forth():
    (plain, loss), (found, less) = changes(None), changes(0.01)
    assert plain > 5
    assert found < plain / 10
    assert less < loss


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    def result(params, x):
        fn, optimizer = fake_quantized(model, LSQ(int4(group_size=8))), qat_optimizer(optax.sgd(1.0), ranges=0.01)
        step = train_step(fn, lambda y, x: jnp.sum(jnp.sin(y)), optimizer, dampening=lambda step: 0.5 + 0.0 * step)
        state = step(train_state(fn, params, optimizer, x), x)[0]
        return {"params": state.params, "ranges": state.qat.ranges}

    mesh, params, x = mesh_of(kind), params_of(), inputs()
    want = result(params, x)
    with jax.set_mesh(mesh):
        got = result(placed_params(params, mesh, kind), put(x, mesh, P("data")))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.mean(~np.isclose(a, b, atol=1e-4)) < 0.01  # other sums put a few weights over a border


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_less_than_nothing_or_more_than_all_is_refused(share):
    with pytest.raises(ValueError, match=f"dampening={share} is a share of a distance; give 0 to 1"):
        taken(1.0, dampening=share)
