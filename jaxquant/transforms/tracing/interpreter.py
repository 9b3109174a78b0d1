"""Runs a jaxpr, handing every equation that a weight enters to a handler and leaving every other one unchanged."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
import numpy as np

from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.transforms.tracing import compat, products
from jaxquant.transforms.tracing.loops import CALLS
from jaxquant.transforms.tracing.payloads import type_of
from jaxquant.transforms.tracing.recorder import Recorder
from jaxquant.transforms.tracing.views import RENAMINGS, Step, View, make_view, within

# Operations that models repeat on one input for each weight: casts of an input, and arithmetic on a layer's index.
RESHAPING = frozenset(("convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim"))
INDEXING = frozenset(("lt", "add", "select_n", "jit", "pjit"))


Loops = frozenset  # of loop tokens


class Handler(Protocol):
    """What a transformation does with weights. `rename`, `product` and `lookup` return the equation's results."""

    def rename(self, it: "Interpreter", steps: list[Step], eqn, ins: list) -> list:
        """An operation that renames the weight; the steps have everything but the new payloads."""

    def product(self, it: "Interpreter", product: products.Product) -> list:
        """A product that consumes it."""

    def lookup(self, it: "Interpreter", lookup: products.Lookup, eqn, ins: list) -> list:
        """A gather of its rows."""

    def dense(self, eqn, values: list, why: str) -> list:
        """The values, with arrays in place of views: `eqn` uses them in a way that cannot be followed."""


@dataclasses.dataclass
class Interpreter:
    """Interprets jaxprs with one handler; each scope (loop body, checkpointed function) has its own, see `scope`.

    Attributes:
      handler: what is done with weights.
      recorder: statistics of this scope.
      loops: (token, iteration) of every loop around this scope, outermost first.
      tokens: source of loop tokens, shared by all scopes.
      base: the loops whose iteration decides whether this scope runs at all.
      depends: for each variable, the loops from whose iterations its value follows.
      repeated: results of operations that models repeat, by what they were made of.
      gathered: of arrays whose rows were gathered from those of another, by id: themselves, how many rows that had, and
        which were taken.
    """

    handler: Handler
    recorder: Recorder = dataclasses.field(default_factory=Recorder)
    loops: tuple[tuple[int, jax.Array], ...] = ()
    tokens: Any = dataclasses.field(default_factory=itertools.count)
    base: Loops = frozenset()
    depends: dict[Any, Loops] = dataclasses.field(default_factory=dict)
    repeated: dict = dataclasses.field(default_factory=dict)
    gathered: dict[int, tuple[jax.Array, int, jax.Array]] = dataclasses.field(default_factory=dict)
    closed: Any = None

    def run(self, closed: jexc.ClosedJaxpr, args: list, depends: list[Loops] | None = None) -> list:
        """The results of a jaxpr; `args` and results may be views. `depends` is that of each argument."""
        self.closed = closed
        jaxpr = closed.jaxpr
        self.depends = dict(zip(jaxpr.invars, depends or [self.base] * len(args), strict=True))
        env = dict(zip(jaxpr.constvars, closed.consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

        def read(v):
            return v.val if isinstance(v, jexc.Literal) else env[v]

        for eqn in jaxpr.eqns:
            ins = [read(v) for v in eqn.invars]
            self.depends.update(dict.fromkeys(eqn.outvars, self.base.union(*self.depends_of(eqn))))
            outs = self.equation(eqn, ins) if any(isinstance(i, View) for i in ins) else self.plain(eqn, ins)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def depends_of(self, eqn) -> list[Loops]:
        """The loops from whose iterations each input of an equation follows."""
        return [self.base if isinstance(v, jexc.Literal) else self.depends.get(v, self.base) for v in eqn.invars]

    def plain(self, eqn, ins: list) -> list:
        """Runs one equation that no view enters, or finds what the same one has given before.

        So an input that is cast anew for each weight is one input, and a layer taken at one position is one position.
        """
        name, scalar = eqn.primitive.name, all(v.aval.shape == () for v in eqn.outvars)
        if name == "gather" and (ids := products.row_ids(eqn, ins)) is not None:
            (rows,) = self.bind(eqn, ins)
            self.gathered[id(rows)] = rows, len(ins[0]), ids
            return [rows]
        if eqn.effects or (name not in RESHAPING and not (scalar and name in INDEXING)):
            return self.bind(eqn, ins)
        same = [(str(v.aval), np.asarray(v.val).tobytes()) if isinstance(v, jexc.Literal) else id(i)
                for v, i in zip(eqn.invars, ins, strict=True)]  # fmt: skip
        what = id(eqn.params["jaxpr"]) if name in ("jit", "pjit") else str(eqn.params)
        key = (name, what, *same)
        if key not in self.repeated:
            self.repeated[key] = (self.bind(eqn, ins), eqn, ins)  # these are kept, so that their ids stay theirs
        return self.repeated[key][0]

    def bind(self, eqn, ins: list) -> list:
        """Runs one equation unchanged, on values without views."""
        return compat.bind(eqn, ins, self.closed)

    def equation(self, eqn, ins: list) -> list:
        """Runs one equation that a view enters."""
        name = eqn.primitive.name
        if name in CALLS:
            return CALLS[name](self, eqn, ins)
        if name == "optimization_barrier":
            return ins  # it only orders computation
        if name in RENAMINGS and isinstance(ins[0], View):
            steps = RENAMINGS[name](ins[0], eqn, ins)
            if steps is not None:
                return self.handler.rename(self, [self._placed(s, ins[0]) for s in steps], eqn, ins)
        if name == "gather" and (lookup := products.as_lookup(eqn, ins)) is not None:
            return self.handler.lookup(self, lookup, eqn, ins)
        product = products.as_product(eqn, ins)
        if product is None:
            return self.other(eqn, ins, "it is no product, lookup or renaming that jaxquant knows")
        if not product.whole():
            return self.other(eqn, ins, "it sums over a part of an axis of the weight")
        return self.handler.product(self, product)

    def _placed(self, step: Step, old: View) -> Step:
        return (within(step[0], old, self.loops[-1][0]), step[1]) if self.loops else step

    def other(self, eqn, ins: list, why: str) -> list:
        """Runs an equation that cannot be followed on dense values."""
        return self.bind(eqn, self.dense(eqn, ins, why))

    def dense(self, eqn, values: list, why: str) -> list:
        """The values, with arrays in place of the views among them; `why` says why the equation needs arrays."""
        return self.handler.dense(eqn, values, why) if any(isinstance(v, View) for v in values) else values

    def inline(self, eqn, closed: jexc.ClosedJaxpr, args: list) -> list:
        """Runs an inner jaxpr as if its equations stood here: products in it share statistics with those around it."""
        shared = {"repeated": self.repeated, "gathered": self.gathered}
        inner = Interpreter(self.handler, self.recorder, self.loops, self.tokens, self.base, **shared)
        return inner.run(closed, args, self.depends_of(eqn))

    def scope(self, closed: jexc.ClosedJaxpr, depends: list[Loops], **options) -> "Scope":
        """A callable that runs an inner jaxpr with this handler. Arguments as the fields of `Scope`."""
        return Scope(self, closed, depends, **options)


@dataclasses.dataclass(eq=False)  # JAX caches by the callable
class Scope:
    """Runs an inner jaxpr: `(args) -> (results, moments)`, `(args, iteration)` for a loop's body.

    The moments are a list of pytrees of arrays that JAX's own control flow can carry; what they are moments *of* is
    static, and stands in `recorder` once the scope was traced.

    Attributes:
      outer: the interpreter around it.
      closed: the jaxpr.
      depends: of each argument, the loops from whose iterations it follows.
      loop: the token of the loop whose body it is.
      base: loops, besides those of the outer scope, that decide whether it runs at all.
      recorder: what it has recorded, without the moments.
    """

    outer: Interpreter
    closed: jexc.ClosedJaxpr
    depends: list[Loops]
    loop: int | None = None
    base: Loops = frozenset()
    recorder: Recorder = dataclasses.field(default_factory=Recorder)

    def __call__(self, args, iteration=None):
        """Results and moments; `args` may hold views."""
        outer, base = self.outer, self.outer.base | self.base
        loops = outer.loops if self.loop is None else (*outer.loops, (self.loop, iteration))
        recorder = Recorder(keeps=outer.recorder.keeps and self.recorder.keeps)
        inner = Interpreter(outer.handler, recorder, loops, outer.tokens, base)
        outs = inner.run(self.closed, list(args), [d | base for d in self.depends])
        self.recorder = dataclasses.replace(inner.recorder, moments=[], known={})  # no tracer outlives its trace
        return outs, inner.recorder.moments


def paths_of(ins: list) -> list[str]:
    """The paths of the weights among an equation's inputs."""
    return list(dict.fromkeys(v.path for v in ins if isinstance(v, View)))


def named_leaves(tree: Any, is_leaf: Callable | None = None) -> list[tuple[str, Any]]:
    """The leaves of a tree, with their paths.

    Raises:
      ValueError: two leaves have one path, because a key contains a "/".
    """
    leaves = [(path_name(k), leaf) for k, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]
    if len(dict(leaves)) < len(leaves):
        double = next(path for path, _ in leaves if sum(path == p for p, _ in leaves) > 1)
        raise ValueError(f"two leaves of the parameters have the path {double!r}; rename a key that contains a '/'")
    return leaves


def path_name(key_path) -> str:
    """ "a/b/0" for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def traceable(leaf) -> bool:
    """Whether an input of a model function is an array; the rest (flags, None, strings) is static."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def arrays_of(tree: Any) -> list:
    """The leaves of a tree that are arrays."""
    return [leaf for leaf in jax.tree.leaves(tree) if traceable(leaf)]


def kind_of(tree: Any) -> tuple:
    """What a compiled program depends on: structure, shapes and dtypes, and the values of leaves that are no arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, *((a.shape, a.dtype) if traceable(a) else a for a in leaves)


def is_matrix(leaf) -> bool:
    """Whether a leaf of a parameter tree is a float array of two or more axes, and not empty."""
    return traceable(leaf) and leaf.ndim >= 2 and leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def trace(fn: Callable, params: Any, inputs: tuple, is_leaf: Callable | None = None):
    """Traces `fn(params, *inputs)` with every array as an argument.

    Leaves of `params` that are QTensors (if `is_leaf` says so) are traced as dense arrays of their shape and dtype.

    Returns:
      `(closed jaxpr, structure of the result, [(path, leaf) of params], flat arrays of inputs)`; the jaxpr takes the
      leaves of params, then the arrays.
    """
    leaves, structure = named_leaves(params, is_leaf), jax.tree.structure(params, is_leaf=is_leaf)
    flat, input_structure = jax.tree.flatten(inputs)
    dynamic = [i for i, leaf in enumerate(flat) if traceable(leaf)]

    def call(weights, arrays):
        full = list(flat)
        for i, a in zip(dynamic, arrays, strict=True):
            full[i] = a
        return fn(jax.tree.unflatten(structure, weights), *jax.tree.unflatten(input_structure, full))

    shapes = [type_of(leaf) if is_qtensor(leaf) else leaf for _, leaf in leaves]
    arrays = [flat[i] for i in dynamic]
    closed, result = jax.make_jaxpr(call, return_shape=True)(shapes, arrays)
    return closed, jax.tree.structure(result), leaves, arrays


def start(
    handler: Handler,
    closed,
    leaves: list,
    arrays: list,
    chosen: Callable[[str, Any], bool],
    recorder: Recorder | None = None,
):
    """Interprets a traced function, following the weights that `chosen(path, leaf)` picks.

    Returns `(flat results, recorder)`; results may be views.
    """
    it = Interpreter(handler, Recorder() if recorder is None else recorder)
    args = [make_view(path, leaf) if chosen(path, leaf) else leaf for path, leaf in leaves]
    return it.run(closed, args + arrays), it.recorder
