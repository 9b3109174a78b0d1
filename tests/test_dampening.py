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
from meshes import SPLIT, P, inputs, mesh_of, model, params_of, put

from jaxquant.methods.lsq import LSQ
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.spec import QuantSpec, int4
from jaxquant.transforms.training.fake_quantized import fake_quantized
from jaxquant.transforms.training.optimizer import qat_optimizer
from jaxquant.transforms.training.schedule import Schedule
from jaxquant.transforms.training.steps import train, train_state, train_step

X = normal(64, 16, seed=1)
SPECS = {
    "extremes": QuantSpec(bits=4, group_size=4, narrow_range=True),
    "learned": QuantSpec(bits=3, group_size=8, symmetric=False),
}


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """Optax needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def net(params, x):
    return jnp.tanh(x @ params["extremes"]) @ params["learned"] * params["free"]


PARAMS = {"extremes": normal(16, 32, seed=2), "learned": normal(32, 8, seed=3), "free": jnp.ones(8)}


def taken(step_of, schedule=None, dampening=None):
    """The state after one step of the net."""
    recipe = [("extremes", RTN(SPECS["extremes"])), ("learned", LSQ(SPECS["learned"]))]
    fn, optimizer = fake_quantized(net, recipe, schedule=schedule), qat_optimizer(optax.sgd(step_of), ranges=0.01)
    step = train_step(fn, lambda y, x: jnp.mean(jnp.square(y - 1)), optimizer, dampening=dampening)
    return step(train_state(fn, PARAMS, optimizer, X), X)[0]


def qparams_of(w, ranges, spec):
    """Scales and zero points of each weight, in float64."""
    if ranges:
        scale, zero = (np.asarray(ranges[name], np.float64) for name in ("scale", "zero_point"))
        return (np.repeat(a, spec.group_size, 0) for a in (np.abs(scale), np.round(np.clip(zero, -4, 3))))
    groups = np.abs(w).reshape(-1, spec.group_size, w.shape[1]).max(1)
    return np.repeat(groups / 7, spec.group_size, 0), 0.0


def test_a_step_pulls_to_the_code_and_takes_up_a_new_one_in_the_middle():
    plain, found = taken(3.0), taken(3.0, dampening=lambda step: jnp.where(step == 0, 0.25, 1.0))
    assert_same(found.qat.ranges, plain.qat.ranges, 1e-6)
    np.testing.assert_allclose(found.params["free"], plain.params["free"], rtol=1e-6)
    for path, spec in SPECS.items():
        w, before = (np.asarray(a[path], np.float64) for a in (plain.params, PARAMS))
        scale, zero = qparams_of(w, plain.qat.ranges.get(path), spec)
        low, high = (-7, 7) if spec.symmetric else (-4, 3)
        codes, old = (np.clip(np.round(a / scale) + zero, low, high) for a in (w, before))
        center = (codes - zero) * scale
        assert 0.1 < np.mean(codes != old) < 0.9
        want = np.where(codes == old, w + 0.25 * (center - w), center)
        tie = np.abs(np.abs(w / scale - np.round(w / scale)) - 0.5) < 1e-4  # float32 may round it to the other side
        tie |= np.abs(np.abs(before / scale - np.round(before / scale)) - 0.5) < 1e-4
        assert np.mean(tie) < 0.01
        np.testing.assert_allclose(np.asarray(found.params[path])[~tie], want[~tie], atol=1e-5)


def test_it_begins_where_the_schedule_ends():
    later = Schedule(start=1)
    assert_same(taken(3.0, later, dampening=0.25).params, taken(3.0, later).params, 1e-6)
    assert np.any(np.abs(taken(3.0, dampening=0.25).params["learned"] - taken(3.0).params["learned"]) > 1e-3)


def changes(dampening):
    """How many weights change their code in each of the last 200 steps, where the best value lies between two codes."""
    config = LSQ(int4())
    fn, optimizer = fake_quantized(lambda params, x: x @ params["w"], config), qat_optimizer(optax.adam(2e-3), ranges=0)
    w = normal(16, 32, seed=4)
    step = train_step(fn, lambda y, x, w: jnp.mean(jnp.square(y - x @ w)), optimizer, dampening=dampening)
    seen = []
    round_ = jax.jit(lambda params, state: fn.apply(params, state, jnp.eye(16))[0])
    state = train_state(fn, {"w": w}, optimizer, X)
    train(step, state, [X] * 400, w, watch=lambda s, _: seen.append(np.asarray(round_(s.params, s.qat))))
    return np.mean([np.sum(np.abs(a - b) > 1e-4) for a, b in itertools.pairwise(seen[200:])])


def test_weights_between_two_codes_no_longer_go_back_and_forth():
    plain = changes(None)
    assert plain > 5
    assert changes(0.01) < plain / 10


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    def result(params, x):
        fn, optimizer = fake_quantized(model, LSQ(int4(group_size=8))), qat_optimizer(optax.sgd(1.0), ranges=0.01)
        step = train_step(fn, lambda y, x: jnp.sum(jnp.sin(y)), optimizer, dampening=0.5)
        state = step(train_state(fn, params, optimizer, x), x)[0]
        return {"params": state.params, "ranges": state.qat.ranges}

    mesh, params, x = mesh_of(kind), params_of(), inputs()
    want = result(params, x)
    with jax.set_mesh(mesh):
        placed = put(params, mesh, SPLIT if kind == AxisType.Auto else {k: P() for k in SPLIT})
        got = result(placed, put(x, mesh, P("data")))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.mean(~np.isclose(a, b, atol=1e-4)) < 0.01  # other sums put a few weights over a border


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=f"dampening={share} is a share of a distance; give 0 to 1"):
        taken(1.0, dampening=share)
