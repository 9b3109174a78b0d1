"""What a function with quantized weights holds in memory: never more of a weight than one matrix is dense.

The kernels dequantize the matrix they multiply with, so a float array of the size of one layer's matrix is allowed
anywhere. Every other result of every equation counts, in every body of a loop and branch.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from checks import consumed, quantize_case
from functions import CASES, normal
from programs import computed

from jaxquant.numerics.affine import quantize
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import int3, int4, int8
from jaxquant.transforms.dequantize import dequantize_params
from jaxquant.transforms.quantized import quantized

STACKED = [  # layers in one array, by every way to reach one of them
    "scan",
    "scan_reverse",
    "nested_scan",
    "scan_of_blocks",
    "stack_indexed",
    "stack_unstacked",
    "first_layer_apart",
    "layer_axis_in_the_middle",
    "fori_loop_over_layers",
    "while_loop_over_layers",
    "take_layers",
    "switch",
    "scan_with_cond",
    "remat_in_scan_in_jit",
    "experts_scanned",
    "linen_scan_remat",
    "nnx_scan_remat",
]
REMATERIALIZED = ["remat_in_scan_in_jit", "linen_scan_remat", "nnx_scan_remat"]
SPECS = {"int8": int8(), "int4": int4(group_size=8), "int3": int3(group_size=8, symmetric=False)}


def two_tokens(width=16):
    """So few that no activation is as large as a matrix."""
    return normal(1, 2, width)


def largest(fn, *args, floats_only):
    """Entries of the largest array that the program of `fn` holds or computes."""
    types = computed(jax.make_jaxpr(fn)(*args))
    return max(t.size for t in types if jnp.issubdtype(t.dtype, jnp.floating) or not floats_only)


def stacked_case(name, spec):
    """Types of the parameters of a case, and the entries of its largest matrix and of its smallest stack."""
    consumed(name)  # runs the reference, which nothing can while types are computed
    qparams = jax.eval_shape(lambda: quantize_case(CASES[name], spec)[0])
    weights = [q for q in jax.tree.leaves(qparams, is_leaf=is_qtensor) if is_qtensor(q)]
    matrix = max(math.prod(q.shape[a] for a in q.contract + q.out) for q in weights)
    stack = min(q.size for q in weights)
    assert matrix < stack
    return qparams, matrix, stack


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers_are_never_dense_at_once(name, spec):
    """Nor are packed codes unpacked; codes of 8 bits are themselves an entry each, and may be moved as they are."""
    qparams, matrix, stack = stacked_case(name, spec)
    run = quantized(CASES[name].apply)
    assert largest(run, qparams, two_tokens(), floats_only=True) == matrix
    if spec.bits <= 4:  # a byte holds two codes or more
        assert largest(run, qparams, two_tokens(), floats_only=False) < stack


@pytest.mark.parametrize("name", STACKED)
def test_a_dense_stack_would_be_found(name):
    case = CASES[name]
    qparams, _, stack = stacked_case(name, int4(group_size=8))
    run = lambda params, x: case.apply(dequantize_params(params), x)  # noqa: E731
    assert largest(run, qparams, two_tokens(), floats_only=True) >= stack


@pytest.mark.parametrize("name", REMATERIALIZED)
def test_gradients_of_rematerialized_layers_keep_no_dense_stack(name):
    qparams, matrix, _ = stacked_case(name, int4(group_size=8))
    gradient = jax.grad(lambda x, params: jnp.sum(quantized(CASES[name].apply)(params, x)))
    assert largest(gradient, two_tokens(), qparams, floats_only=True) == matrix


LOOKUPS = {
    "index": lambda w, ids: w[ids],
    "take": lambda w, ids: jnp.take(w, ids, axis=0),
    "take, clipped": lambda w, ids: jnp.take(w, ids, axis=0, mode="clip"),
    "take of the transposed": lambda w, ids: jnp.take(w.T, ids, axis=1),
    "in bfloat16": lambda w, ids: w.astype(jnp.bfloat16)[ids],
    "one id after another": lambda w, ids: jax.lax.scan(lambda c, i: (c, jnp.take(w, i, axis=0)), None, ids)[1],
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("fn", LOOKUPS.values(), ids=LOOKUPS)
def test_a_lookup_makes_only_its_rows_dense(fn, spec):
    table, ids = quantize(normal(64, 16), spec, contract=(-1,), out=(-2,)), jnp.array([3, 60, 7])
    assert largest(quantized(fn), table, ids, floats_only=False) == 3 * 16
    dense = lambda w, ids: fn(dequantize_params(w), ids)  # noqa: E731
    assert largest(dense, table, ids, floats_only=True) == 64 * 16


def test_a_lookup_of_experts_makes_only_those_dense():
    w, ids = quantize(normal(8, 16, 8), int4(group_size=8)), jnp.array([3, 0])
    run = quantized(lambda w, x: jnp.einsum("tk,tkn->tn", x, w[ids]))
    assert largest(run, w, normal(2, 16), floats_only=False) == 2 * 16 * 8


FLOAT_ARRAY = re.compile(r"\b(?:bf16|f16|f32|f64)\[([\d,]+)\]")


@pytest.mark.parametrize("name", ["scan", "fori_loop_over_layers", "scan_of_blocks", "layer_axis_in_the_middle"])
def test_the_compiler_does_not_dequantize_before_the_loop(name):
    qparams, matrix, _ = stacked_case(name, int4(group_size=8))
    text = jax.jit(quantized(CASES[name].apply)).lower(qparams, two_tokens()).compile().as_text()
    assert max(math.prod(map(int, dims.split(","))) for dims in FLOAT_ARRAY.findall(text)) == matrix
