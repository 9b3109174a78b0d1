"""One compiled program serves every width of codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from jaxquant.methods.awq import AWQ
from jaxquant.methods.chain import Chain
from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.llm_int8 import LLMInt8
from jaxquant.methods.rtn import RTN
from jaxquant.methods.smoothquant import SmoothQuant
from jaxquant.numerics.bits import join_bits, split_bits
from jaxquant.numerics.spec import QuantSpec
from jaxquant.transforms.calibrate import calibrate
from jaxquant.transforms.quantize import quantize_params

CONFIGS = {
    "RTN": RTN,
    "GPTQ, refined": lambda spec: GPTQ(spec, act_order=False, clip="output", refine=1),
    "AWQ": AWQ,
    "smoothed": lambda spec: Chain(SmoothQuant(None), RTN(spec)),
}


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


@pytest.fixture(scope="module")
def given():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"a": jax.random.normal(keys[0], (32, 24)), "b": jax.random.normal(keys[1], (24, 40))}
    x = jax.random.normal(keys[2], (8, 64, 32)) @ jax.random.normal(keys[3], (32, 32))
    return params, calibrate(model, params, [x])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_other_bits_compile_nothing_but_their_packing(given, config):
    params, stats = given
    for bits in (5, 4):  # two programs that pack, and small ones that add up sizes
        quantize_params(params, stats, config(QuantSpec(bits=bits, group_size=8)))
    with compilations() as seen:
        trees = {b: quantize_params(params, stats, config(QuantSpec(bits=b, group_size=8)))[0] for b in (8, 7, 6, 4)}
    assert not seen
    for bits, tree in trees.items():
        assert tree["a"].spec.bits == bits
        tree["a"].validate()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_codes_are_those_of_a_program_for_these_bits_alone(given, config, symmetric):
    params, stats = given
    method = config(QuantSpec(bits=3, group_size=8, symmetric=symmetric))
    tree, _ = quantize_params({"a": params["a"]}, stats, method)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (RTN, GPTQ, AWQ, SmoothQuant):
            patch.setattr(kind, "any_bits", False)
        alone, _ = quantize_params({"a": params["a"]}, stats, method)
    assert_same_trees(tree, alone)
    assert {int(tree["a"].codes.min()), int(tree["a"].codes.max())} == {-4, 3}


def assert_same_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_config_that_reads_its_bits_is_compiled_for_them():
    config = LLMInt8()
    assert split_bits(config) == (config, ())
    assert join_bits(config, ()) is config
    chain = Chain(SmoothQuant(0.5), RTN(QuantSpec(bits=3)))
    widest, bits = split_bits(chain)
    assert bits == (8, 3)
    assert widest == split_bits(Chain(SmoothQuant(0.5), RTN(QuantSpec(bits=5))))[0]
    assert repr(join_bits(widest, bits)).replace("_TracedSpec", "QuantSpec") == repr(chain)
