"""Embeddings: rows of a weight that are looked up."""

import jax.numpy as jnp
import numpy as np

from functions.cases import D, F, V, act, case, normal, tokens


def tied_reference(params, ids, see):
    w = params["embedding"]
    x = act(w[ids % V])
    see("embedding", x)
    return x @ w.T


@case(
    lambda: {"embedding": normal(V, D)},
    tied_reference,
    batches=tokens,
    axes={"embedding": ((1,), (0,))},
    lookups=frozenset({"embedding"}),
)
def tied_embedding(params, ids):
    return act(params["embedding"][ids]) @ params["embedding"].T


def lookup_reference(params, ids, see):
    x = np.asarray(params["embedding"])[np.asarray(ids)]
    see("w", x)
    return x @ params["w"]


@case(
    lambda: {"embedding": normal(V, D), "w": normal(D, F)},
    lookup_reference,
    batches=tokens,
    lookups=frozenset({"embedding"}),
)
def embedding(params, ids):
    return jnp.take(params["embedding"], ids, axis=0) @ params["w"]
