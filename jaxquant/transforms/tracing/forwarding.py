"""Which results of a jaxpr are its own arguments, unchanged.

Flax's NNX returns the parameters of a module from every scan, conditional and checkpoint that it is used in. They have
been nowhere, and need not leave the body of a loop to arrive at its end.
"""

import jax.extend.core as jexc

from jaxquant.transforms.tracing import compat

Sources = list[int | None]


def forwarded(closed: jexc.ClosedJaxpr) -> Sources:
    """For each result of a jaxpr, the argument that it is; None if it is computed."""
    source = {v: i for i, v in enumerate(closed.jaxpr.invars)}
    for eqn in closed.jaxpr.eqns:
        for v, i in zip(eqn.outvars, forwarded_by(eqn), strict=True):
            if i is not None and not isinstance(eqn.invars[i], jexc.Literal) and eqn.invars[i] in source:
                source[v] = source[eqn.invars[i]]
    return [None if isinstance(v, jexc.Literal) else source.get(v) for v in closed.jaxpr.outvars]


def forwarded_by(eqn) -> Sources:
    """For each result of an equation, the input that it is; None if it is computed, or not looked into."""
    name = eqn.primitive.name
    if name in (*compat.JIT, *compat.REMAT, *compat.CUSTOM):
        return forwarded(compat.inner_jaxpr(eqn))
    if name == "scan":
        return _scan(forwarded(compat.inner_jaxpr(eqn)), *compat.scan_groups(eqn))
    if name == "while":
        a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        sources = forwarded(compat.close(eqn.params["body_jaxpr"]))
        return [a + i if i == b + k else None for k, i in enumerate(sources)]
    if name == "cond":
        branches = zip(*(forwarded(compat.close(b)) for b in eqn.params["branches"]), strict=True)
        return [None if len(set(same)) > 1 or same[0] is None else same[0] + 1 for same in branches]
    return [None] * len(eqn.outvars)


def _scan(sources: Sources, consts: int, carried: int) -> Sources:
    """A carry that every iteration hands on, and slices that come out as they went in."""
    carry = [i if i == consts + k else None for k, i in enumerate(sources[:carried])]
    return carry + [i if i is not None and i >= consts + carried else None for i in sources[carried:]]
