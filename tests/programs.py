"""What a traced program holds and computes, wherever in it."""

import jax
from jax.extend import core


def equations(jaxpr):
    """Every equation, those of inner programs (bodies of loops, branches, functions) included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from equations(inner)


def computed(jaxpr):
    """The types of all intermediate results and of all constants."""
    yield from (v.aval for eqn in equations(jaxpr) for v in eqn.outvars)
    yield from map(jax.typeof, constants(jaxpr))


def constants(jaxpr):
    """Every array that a program holds."""
    yield from getattr(jaxpr, "consts", ())
    for eqn in jaxpr.eqns:
        yield from (v.val for v in eqn.invars if isinstance(v, core.Literal))
        for inner in _inner(eqn):
            yield from constants(inner)


def _inner(eqn):
    """The programs among the parameters of an equation (`Jaxpr` and `ClosedJaxpr` are one class in JAX 0.12)."""
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
    return [p for p in leaves if hasattr(p, "eqns")]
