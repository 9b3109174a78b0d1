"""Calibration against statistics recomputed, one product at a time, from plain code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import CASES, Seen

from jaxquant.numerics.statistics import HELD_OUT_EVERY, SAMPLE_ROWS, token_hash
from jaxquant.transforms.calibrate import calibrate


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
        "absmax": np.max(np.abs(x), 0, initial=0),
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


@functools.cache
def calibrated(name):
    case = CASES[name]
    return calibrate(case.apply, case.params(), case.batches())


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_products_inputs(name):
    case, stats = CASES[name], calibrated(name)
    params = case.params()
    want, axes = oracle(case.batches(), case.reference, params), axes_of(case, params)
    assert set(stats.products) == set(want)
    assert stats.lookups == case.lookups
    assert {path for path, _ in stats.notes} == case.noted
    for path, leads in want.items():
        product, (shape, contract, out) = stats.products[path], axes[path]
        assert (product.contract, product.out) == (contract, out), path
        check(product.inputs, leads, lead_shape(shape, contract, out), int(np.prod([shape[a] for a in contract])))
    for group in case.shared:
        assert len({id(stats.products[p].inputs) for p in group}) == 1


