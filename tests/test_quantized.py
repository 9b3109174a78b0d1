"""Functions run with quantized weights, against the same functions on the dequantized weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import CASES, Seen
from test_calibrate import axes_of

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.numerics.spec import int3, int4, int8
from jaxquant.transforms.quantized import quantized


def specs(case):
    return {
        "int8": int8(),
        "int4_group": int4(group_size=case.group),
        "int3_asymmetric_group": int3(group_size=case.group, symmetric=False),
        "int8_per_tensor": int8(granularity="per_tensor"),
    }


def quantize_case(case, spec):
    """The case's parameters, with every weight that a product consumes quantized; and the same dequantized."""
    params = case.params()
    axes, used = axes_of(case, params), consumed(case.name)

    def one(path, leaf):
        shape, contract, out = axes[path]
        negative = [tuple(a - len(shape) for a in axes) for axes in (contract, out)]
        return quantize(leaf, spec, contract=negative[0], out=negative[1])

    @jax.jit
    def both(leaves):
        q = {path: one(path, leaf) for path, leaf in leaves.items()}
        return q, {path: dequantize(a) for path, a in q.items()}

    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}
    trees = both({path: jnp.asarray(named[path]) for path in used})
    return [jax.tree.unflatten(structure, [t.get(path, leaf) for path, leaf in named.items()]) for t in trees]


@functools.cache
def consumed(name):
    """Paths of the weights that the products of a case consume."""
    case, seen = CASES[name], Seen()
    for batch in case.batches():
        case.reference(case.params(), batch, seen)
    return tuple(seen.inputs)


def nbytes(tree):
    return sum(a.nbytes for a in jax.tree.leaves(tree) if hasattr(a, "nbytes"))


def constants(jaxpr):
    """Every array that a program holds, its inner programs included."""
    yield from jaxpr.consts
    for eqn in jaxpr.jaxpr.eqns:
        yield from (v.val for v in eqn.invars if hasattr(v, "val"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "consts"):
                yield from constants(inner)
            elif hasattr(inner, "eqns"):
                yield from constants(jax.extend.core.ClosedJaxpr(inner, ()))


def assert_same(got, want, atol=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = np.max(np.abs(np.asarray(b, np.float64)), initial=0.0) or 1.0
        np.testing.assert_allclose(np.asarray(a, np.float64) / scale, np.asarray(b, np.float64) / scale, atol=atol)


LOOSE = {"cast_to_bf16": 1e-2}  # the dequantized weights are rounded to bfloat16, and the codes are not


@pytest.mark.parametrize("name", CASES)
def test_quantized_is_the_function_of_the_dequantized_weights(name):
    case = CASES[name]
    plain = jax.jit(case.apply)
    for label, spec in specs(case).items():
        qparams, dense = quantize_case(case, spec)
        x = case.batches()[0]
        run = quantized(case.apply)
        assert_same(run(qparams, x), plain(dense, x), LOOSE.get(name, 2e-5))
        weights = [a for a in jax.tree.leaves(qparams, is_leaf=is_qtensor) if is_qtensor(a)]
        if label == "int8" and case.group > 1:
            assert nbytes(weights) < 0.5 * sum(4 * q.size for q in weights)
            smallest = min(q.size for q in weights)
            traced = jax.make_jaxpr(run)(qparams, x)
            sizes = [np.size(c) for c in constants(traced) if jnp.issubdtype(jnp.result_type(c), jnp.floating)]
            assert max(sizes, default=0) < smallest
# ------------------------------------------------------------------------------------------------------------ transformed

NO_DERIVATIVE = {"while_loop_over_layers", "while_loop_until", "callbacks"}  # JAX has none for these


def float_leaves(tree):
    """The float leaves that are not quantized, as a list, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_qtensor)
    at = [i for i, a in enumerate(leaves) if not is_qtensor(a) and jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating)]

    def put(values):
        new = list(leaves)
        for i, a in zip(at, values, strict=True):
            new[i] = a
        return jax.tree.unflatten(structure, new)

    return [jnp.asarray(leaves[i]) for i in at], put


@pytest.mark.parametrize("name", sorted(set(CASES) - NO_DERIVATIVE))
def test_gradients_are_those_of_the_dequantized_function(name):
    """With respect to the inputs, if they are floats, and to all leaves that are not quantized."""
    case = CASES[name]
    x, grads = case.batches()[0], []
    real = jnp.issubdtype(x.dtype, jnp.floating)
    quantized_leaves = {p for p in consumed(name)}
    qparams, dense = quantize_case(case, int4(group_size=case.group))
    leaves, put = float_leaves(qparams)
    kept, _ = jax.tree_util.tree_flatten_with_path(qparams, is_leaf=is_qtensor)
    where = [i for i, (_, a) in enumerate(kept) if not is_qtensor(a) and jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating)]

    def put_dense(values):
        flat, structure = jax.tree.flatten(dense)
        for i, a in zip(where, values, strict=True):
            flat[i] = a
        return jax.tree.unflatten(structure, flat)

    for fn, rebuild in ((quantized(case.apply), put), (case.apply, put_dense)):

        def loss(leaves, x, fn=fn, rebuild=rebuild):
            outs = jax.tree.leaves(fn(rebuild(leaves), x))
            return sum(jnp.sum(jnp.sin(o)) for o in outs if jnp.issubdtype(o.dtype, jnp.floating))

        grads.append(jax.jit(jax.grad(loss, argnums=(0, 1) if real else 0))(leaves, x))
    assert quantized_leaves
    assert jax.tree.leaves(grads[0]) or not real
    assert_same(*grads, max(LOOSE.get(name, 0), 1e-4))
