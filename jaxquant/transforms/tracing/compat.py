"""All that differs between the supported JAX versions (0.10.2 to 0.12), and the primitives without a public name."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jexc
from jax import lax
from jax.sharding import AxisType

# How programs are compiled that run a few times only. On CPUs, JAX 0.10 has two ways to compile fused loops; by its
# default, programs are no faster and take twice as long to compile. Later versions have only that one.
COMPILER_OPTIONS: dict[str, bool | str] = (
    {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
)

JIT = ("jit", "pjit")
REMAT = ("checkpoint", "remat2")
CUSTOM = ("custom_jvp_call", "custom_vjp_call")


def close(jaxpr) -> jexc.ClosedJaxpr:
    """A jaxpr parameter of an equation, closed (in 0.12 `Jaxpr` and `ClosedJaxpr` are one class)."""
    return jaxpr if isinstance(jaxpr, jexc.ClosedJaxpr) else jexc.ClosedJaxpr(jaxpr, ())


def inner_jaxpr(eqn) -> jexc.ClosedJaxpr:
    """The jaxpr that a call-like equation runs on its inputs, in their order."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            return close(eqn.params[name])
    raise TypeError(f"`{eqn.primitive.name}` has no jaxpr among its parameters {sorted(eqn.params)}")


def inner_jaxprs(eqn) -> Iterator[jexc.ClosedJaxpr]:
    """All jaxprs among the parameters of an equation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jexc.Jaxpr | jexc.ClosedJaxpr):
                yield close(item)


def bind(eqn, values: list, closed: jexc.ClosedJaxpr) -> list:
    """Runs one equation, unchanged, on values for its inputs; `closed` is the jaxpr it stands in.

    A one-equation jaxpr is run in place of `primitive.bind`, because the parameters that call-like and
    custom-derivative primitives carry are not those that their `bind` takes.
    """
    free = {v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, jexc.Literal)}
    outs = [v for v in eqn.outvars if not isinstance(v, jexc.DropVar)]
    debug = close(closed).jaxpr.debug_info.with_unknown_names()
    jaxpr = jexc.Jaxpr((), [*free], outs, [eqn], eqn.effects, debug)
    results = iter(jexc.jaxpr_as_fun(jexc.ClosedJaxpr(jaxpr, ()))(*free.values()))
    return [None if isinstance(v, jexc.DropVar) else next(results) for v in eqn.outvars]


def run(closed: jexc.ClosedJaxpr):
    """A callable that runs a jaxpr on flat arguments."""
    return jexc.jaxpr_as_fun(closed)


def stage(fn, *args):
    """Traces `fn` once. Returns a callable that runs the traced program, and the types of its results."""
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    structure = jax.tree.structure(shapes)
    types = jax.tree.unflatten(structure, jaxpr.out_avals)
    return lambda *a: jax.tree.unflatten(structure, run(jaxpr)(*jax.tree.leaves(a))), types


def varying(x) -> frozenset:
    """The mesh axes over which a value inside `shard_map` differs, as far as JAX keeps track (`check_vma`)."""
    aval: Any = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return aval.vma if kind is None else kind.varying


def mesh_axes(x) -> list[str]:
    """`varying(x)`, in the order of the mesh."""
    return [name for name in jax.sharding.get_abstract_mesh().axis_names if name in varying(x)]


def varying_as(x: jax.Array, like) -> jax.Array:
    """`x`, with the type of a value that differs over the same mesh axes as `like`."""
    missing = tuple(varying(like) - varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def callable_of(closed: jexc.ClosedJaxpr, arguments: list, eqns: list, results: list) -> Callable[..., list]:
    """Some equations of a jaxpr as a function of the values of some of its variables."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    debug = close(closed).jaxpr.debug_info.with_unknown_names()
    return jexc.jaxpr_as_fun(jexc.ClosedJaxpr(jexc.Jaxpr((), arguments, results, eqns, effects, debug), ()))


def explicit_axes(x) -> tuple[str, ...]:
    """The mesh axes by which the type of a value says how it is sharded (`jax.sharding.AxisType.Explicit`)."""
    mesh = (x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)).sharding.mesh
    return tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)


def compiler_sharded(fn, like, out_sharding):
    """`fn`, whose inside the compiler shards as it sees fit where types say how values like `like` are sharded."""
    axes = explicit_axes(like)
    return jax.sharding.auto_axes(fn, out_sharding=out_sharding, axes=axes) if axes else fn


def scan_groups(eqn) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried; the rest are sliced.

    Read off the ranks, because the names of the parameters differ between versions.
    """
    body = close(eqn.params["jaxpr"]).jaxpr
    sliced = [len(o.aval.shape) > len(i.aval.shape) for o, i in zip(eqn.invars, body.invars, strict=True)]
    stacked = [len(o.aval.shape) > len(i.aval.shape) for o, i in zip(eqn.outvars, body.outvars, strict=True)]
    carried = len(stacked) - sum(stacked)
    if sliced != sorted(sliced) or stacked != sorted(stacked):
        raise TypeError("this JAX version lays out the inputs of lax.scan in an order that jaxquant does not know")
    return len(sliced) - sum(sliced) - carried, carried
