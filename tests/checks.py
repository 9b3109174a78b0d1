"""What the tests of model functions compare by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from functions import CASES, Seen

from jaxquant.numerics.affine import dequantize, quantize
from jaxquant.numerics.statistics import HELD_OUT_EVERY, SAMPLE_ROWS, token_hash


def lead_shape(shape, contract, out):
    return tuple(n for a, n in enumerate(shape) if a not in contract + out)


def axes_of(case, params):
    """Contracting and output axes of every leaf, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}
    last = {p: ((np.ndim(a) - 2,), (np.ndim(a) - 1,)) for p, a in named.items()}
    return {p: (np.shape(named[p]), *case.axes.get(p, last[p])) for p in named}


def oracle(batches, reference, params):
    """`{path: {lead: (rows [T, K], positions [T])}}` over all batches; `reference(params, batch, see)`."""
    found, start = {}, 0
    for batch in batches:
        seen = Seen()
        reference(params, batch, seen)
        for path, leads in seen.inputs.items():
            for lead, pieces in leads.items():
                found.setdefault(path, {}).setdefault(lead, []).extend((x, start + at) for x, at in pieces)
        start += batch.size if jnp.issubdtype(batch.dtype, jnp.integer) else batch.size // batch.shape[-1]
    return {p: {i: tuple(map(np.concatenate, zip(*v, strict=True))) for i, v in d.items()} for p, d in found.items()}


def expected(rows, position, k):
    """Statistics of one matrix's inputs, in float64."""
    rank = np.asarray(token_hash(jnp.asarray(position, jnp.uint32)))
    finite = np.isfinite(rows).all(-1)
    held = rank % HELD_OUT_EVERY == 0
    x = rows[finite & ~held].astype(np.float64)
    order = np.argsort(rank[held & finite], kind="stable")[:SAMPLE_ROWS]
    sample = np.zeros((SAMPLE_ROWS, k))
    sample[: len(order)] = rows[held & finite][order]
    n = max(len(x), 1)
    return {
        "gram": x.T @ x / n,
        "absmax": np.max(np.abs(rows[finite]), 0, initial=0),
        "mean_abs": np.abs(x).sum(0) / n,
        "count": len(x),
        "dropped": int((~finite).sum()),
        "held_out": sample,
    }


def check(inputs, leads, lead, k):
    """Compares statistics `[*lead, ...]` with the oracle's `{lead: (rows, positions)}`."""
    empty = np.zeros((0, k), np.float32), np.zeros(0, int)
    for at in np.ndindex(lead):
        want = expected(*leads.get(at, empty), k)
        for name, value in want.items():
            got = np.asarray(getattr(inputs, name))
            assert got.shape == lead + np.shape(value), name
            scale = np.max(np.abs(value), initial=0.0) or 1.0
            np.testing.assert_allclose(got[at] / scale, value / scale, atol=1e-5, err_msg=f"{name} at {at}")


def assert_same(got, want, atol=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = np.max(np.abs(np.asarray(b, np.float64)), initial=0.0) or 1.0
        np.testing.assert_allclose(np.asarray(a, np.float64) / scale, np.asarray(b, np.float64) / scale, atol=atol)


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
