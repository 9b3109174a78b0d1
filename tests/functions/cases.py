"""What a case is, the table of all, and the pieces that the functions are made of.

A case runs a model twice: `apply` is the model as people write it, and `reference` the same arithmetic one operation
after another, in Python loops, which tells `see` the input of every product. The two must agree, so a mistake in the
reference shows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

D, F, H, L, E, V = 16, 32, 4, 3, 4, 24  # width, inner width, heads, layers, experts, vocabulary
B, T = 4, 8  # sequences and tokens of a batch
HEAD = D // H


def normal(*shape, seed=0, dtype="float32"):
    """Weights of about unit gain."""
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape) * 0.3, dtype)


def floats(batches=2, shape=(B, T, D)):
    return [normal(*shape, seed=100 + i) * 3 for i in range(batches)]


def tokens(batches=2, shape=(B, T)):
    rng = np.random.default_rng(5)
    return [jnp.asarray(rng.integers(0, V, shape), jnp.int32) for _ in range(batches)]


class Seen:
    """Collects `{path: {position along the leading axes: [(rows [T, K], offsets in the batch [T])]}}`."""

    def __init__(self):
        self.inputs: dict[str, dict[tuple, list]] = {}

    def __call__(self, path, x, lead=(), at=None):
        """Notes an input `[..., K]`; `at` are its rows' positions in the batch, by default 0, 1, 2, …"""
        rows = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
        at = np.arange(len(rows)) if at is None else np.asarray(at).reshape(-1)
        lead = (lead,) if isinstance(lead, int) else lead
        self.inputs.setdefault(path, {}).setdefault(lead, []).append((rows, at))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model function.

    Attributes:
      apply: `apply(params, x)`.
      params, batches: its parameters and inputs, made anew by each call.
      reference: `reference(params, x, see)` gives the same result.
      axes: contracting and output axes per path; by default those of `[..., in, out]`.
      shared: groups of paths whose statistics are one object.
      lookups: paths that are looked up.
      noted: paths that `calibrate` mentions in its notes.
      group: group size that divides the inputs of every weight.
    """

    name: str
    apply: Callable
    params: Callable[[], Any]
    reference: Callable
    batches: Callable[[], list] = floats
    axes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    lookups: frozenset = frozenset()
    noted: frozenset = frozenset()
    group: int = 8


CASES: dict[str, Case] = {}


def case(params, reference, **fields):
    """Registers the decorated function as a case of its name."""

    def register(apply):
        assert apply.__name__ not in CASES
        CASES[apply.__name__] = Case(apply.__name__, apply, params, reference, **fields)
        return apply

    return register


def act(x):
    return jnp.tanh(x)


def norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def layer(w, *index):
    return jax.tree.map(lambda a: a[index], w)


def simple_reference(params, x, see, then=lambda y: y):
    see("w", x)
    return then(x @ params["w"])


SQUARE = lambda: {"w": normal(D, D)}  # noqa: E731
