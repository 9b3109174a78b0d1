"""Splits a function where the product of one weight ends and the input of the next begins.

Weights are of one stage if none of their inputs follows from another's product. So weights can be quantized one stage
after the other, each behind what the quantized ones before it give, and every product is computed once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jexc
from jax import lax

from jaxquant.transforms.memory import types_bytes
from jaxquant.transforms.tracing import compat, interpreter


class Stages:
    """The stages of a function `fn(params, x)`.

    Args:
      fn: any JAX function of arrays, or of pytrees of them.
      groups: for the path of each weight that is quantized, its group: weights of one group are of one stage.

    Attributes:
      weights: the paths of the weights of each stage, in order. After those comes a last stage without any.
      held: bytes that each stage hands on to the next, for the largest input.
      peaks: bytes of the values of each stage that are needed at one time, if each equation runs by itself.
    """

    def __init__(self, fn: Callable, groups: Mapping[str, Any]):
        self.weights: list[set[str]] = []
        self.held: list[int] = []
        self.peaks: list[int] = []
        self._fn, self._groups = fn, groups
        self._parts: dict[tuple, tuple[Callable, Any]] = {}

    def trace(self, params: Any, x: Any) -> None:
        """Traces and splits the function for inputs like x, unless it has done so before.

        Raises:
          ValueError: the order of the weights is not that for earlier inputs.
        """
        types = _types(x)
        if (0, types) in self._parts:
            return
        closed, structure, leaves, arrays = interpreter.trace(self._fn, params, (x,))
        flat = jax.make_jaxpr(functools.partial(_evaluate, closed))(*[leaf for _, leaf in leaves], *arrays)
        split = _Split(flat, [path if path in self._groups else None for path, _ in leaves], self._groups)
        if self.weights and self.weights != split.weights:
            raise ValueError("the function uses its weights in another order for inputs of other shapes")
        self.weights = split.weights
        parts = split.parts()
        for stage, part in enumerate(parts):
            self._parts[stage, types] = _callable(flat, len(leaves), part), structure
            types = _types([v.aval for v in part.results])
        self.held = _most(self.held, [_nbytes(part.results) for part in parts[:-1]])
        self.peaks = _most(self.peaks, [_peak(part) for part in parts])

    def run(self, stage: int, params: Any, held: Any) -> tuple[list, list]:
        """Runs a stage that has weights.

        Args:
          stage: its number, from 0.
          params: the parameters, in which the weights of the stages before it are quantized.
          held: what the stage before it gave; x for the first.

        Returns:
          What the next stage needs, and the products of the stage's weights with their inputs.
        """
        call, _ = self._parts[stage, _types(held)]
        return call(params, jax.tree.leaves(held))

    def result(self, params: Any, held: list) -> Any:
        """The function's result, by the last stage. Arguments as those of `run`."""
        call, structure = self._parts[len(self.weights), _types(held)]
        return jax.tree.unflatten(structure, call(params, held)[0])


class _Part(NamedTuple):
    """A stage: its equations, what it needs of the stage before, what it hands on, and its weights' products."""

    eqns: list
    needs: list
    results: list
    products: list


class _Split:
    """The equations of a flat jaxpr by stages.

    A value's level is the number of products with weights, one after the other, that it follows from. A stage has the
    weights whose inputs are of one level, or of several where a group would be apart. It begins at the first of those:
    what is of the others is computed to see the inputs of its weights, and then again when they are quantized. Experts
    are one group: which of the rows that were sorted for them are tokens, is known from what has sorted them.

    Args:
      flat: the jaxpr.
      paths: of its parameters, its first arguments; None if it is no weight.
      groups: of the weights, as for `Stages`.
    """

    def __init__(self, flat: jexc.ClosedJaxpr, paths: list[str | None], groups: Mapping[str, Any]):
        self._eqns, self._outvars = flat.jaxpr.eqns, flat.jaxpr.outvars
        self._inputs = flat.jaxpr.invars[len(paths) :]
        self._weights = {v: {path} for v, path in zip(flat.jaxpr.invars, paths, strict=False) if path is not None}
        self._level = dict.fromkeys(self._inputs, 0)
        self._maker: dict[Any, Any] = {}
        self._products: list[tuple[int, Any]] = []  # with the levels of their inputs
        self._experts: set[str] = set()
        levels: list[set[str]] = []  # the weights with inputs of each level
        for eqn in self._eqns:
            self._place(eqn, levels)
        spans: dict[Any, list[int]] = {}
        for level, weights in enumerate(levels):
            for path in weights:
                spans.setdefault("experts" if path in self._experts else groups[path], []).append(level)
        within = {level for span in spans.values() for level in range(span[0] + 1, span[-1] + 1)}
        self._starts = [level for level in range(len(levels)) if level not in within]
        ends = [*self._starts[1:], len(levels)]
        self.weights = [set().union(*levels[a:b]) for a, b in zip(self._starts, ends, strict=True)]

    def _place(self, eqn, levels: list[set[str]]) -> None:
        read = _variables(eqn.invars)
        weights: set[str] = set().union(*(self._weights.get(v, ()) for v in read))
        below = [self._level[v] for v in read if v in self._level]
        if not below:  # made of parameters alone
            self._weights.update(dict.fromkeys(eqn.outvars, weights))
            return
        level = max(below)
        if weights:
            levels += [set() for _ in range(level + 1 - len(levels))]
            levels[level] |= weights
            self._products.append((level, eqn))
            self._experts |= weights if eqn.primitive.name == "ragged_dot_general" else set()
        self._level.update(dict.fromkeys(eqn.outvars, level + bool(weights)))
        self._maker.update(dict.fromkeys(eqn.outvars, eqn))

    def parts(self) -> list[_Part]:
        """All stages, in order."""
        found: list[_Part] = []
        results = self._outvars
        for stage in reversed(range(len(self._starts) + 1)):
            found.append(self._part(stage, results))
            results = found[-1].needs
        return found[::-1]

    def _part(self, stage: int, results: list) -> _Part:
        """The stage that gives these results; no more than they and its products need is computed in it."""
        start, end = [*self._starts, -1, -1][stage], [*self._starts[1:], len(self._eqns), -1, -1][stage]
        products = [v for level, eqn in self._products if start <= level < end for v in _variables(eqn.outvars)]
        known = self._starts[stage - 1] if stage else -1  # the level up to which the stage before has all values
        needs: dict[Any, None] = {}
        chosen: set[int] = set()
        wanted = _variables([*results, *products])
        while wanted:
            v = wanted.pop()
            eqn = self._maker.get(v)
            if eqn is None or (self._level[v] <= known and not self._is_cheap(eqn)):
                needs |= {v: None} if v in self._level else {}
            elif id(eqn) not in chosen:
                chosen.add(id(eqn))
                wanted += _variables(eqn.invars)
        eqns = [eqn for eqn in self._eqns if id(eqn) in chosen or not any(v in self._level for v in eqn.outvars)]
        return _Part(eqns, list(needs) if stage else self._inputs, results, products)

    def _is_cheap(self, eqn) -> bool:
        """Whether it is computed anew in each stage that reads it: what it was made of is handed on in its place."""
        return eqn.primitive.name in interpreter.RESHAPING and all(eqn is not product for _, product in self._products)


def _callable(flat: jexc.ClosedJaxpr, params: int, part: _Part) -> Callable:
    """`(params, held) -> (results, products)` of one part."""
    given = [*flat.jaxpr.constvars, *flat.jaxpr.invars[:params], *part.needs]
    call = compat.callable_of(flat, given, part.eqns, [*part.results, *part.products])

    def run(tree, held):
        outs = call(*flat.consts, *jax.tree.leaves(tree), *held)
        return outs[: len(part.results)], outs[len(part.results) :]

    return run


def _peak(part: _Part) -> int:
    """Bytes of the values that are needed at one time, beside what the part is given."""
    last = {v: i for i, eqn in enumerate(part.eqns) for v in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(part.results), len(part.eqns))
    made: dict[int, list] = {}
    size = most = 0
    for i, eqn in enumerate(part.eqns):
        size += _nbytes(eqn.outvars)
        most = max(most, size)
        for v in eqn.outvars:
            made.setdefault(last.get(v, i), []).append(v)
        size -= _nbytes(made.pop(i, []))
    return most


def _nbytes(values: Sequence) -> int:
    return types_bytes([v.aval for v in _variables(values)])


def _most(a: list[int], b: list[int]) -> list[int]:
    return [max(pair) for pair in zip(a or b, b, strict=True)]


def _evaluate(closed: jexc.ClosedJaxpr, *args) -> list:
    """The results of a jaxpr, without calls of functions and loops of one iteration: their equations become its own."""
    jaxpr = closed.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        ins = [v.val if isinstance(v, jexc.Literal) else env[v] for v in eqn.invars]
        env.update(zip(eqn.outvars, _inlined(closed, eqn, ins), strict=True))
    return [v.val if isinstance(v, jexc.Literal) else env[v] for v in jaxpr.outvars]


def _inlined(closed: jexc.ClosedJaxpr, eqn, ins: list) -> list:
    name = eqn.primitive.name
    if name in (*compat.JIT, *compat.REMAT, *compat.CUSTOM):
        return _evaluate(compat.inner_jaxpr(eqn), *ins)
    if name != "scan" or eqn.params["length"] != 1:
        return compat.bind(eqn, ins, closed)
    constants, carried = compat.scan_groups(eqn)
    whole = constants + carried
    outs = _evaluate(compat.inner_jaxpr(eqn), *ins[:whole], *(lax.squeeze(a, (0,)) for a in ins[whole:]))
    return [*outs[:carried], *(lax.expand_dims(a, (0,)) for a in outs[carried:])]


def _variables(values: Sequence) -> list:
    return [v for v in values if not isinstance(v, jexc.Literal | jexc.DropVar)]


def _types(tree: Any) -> tuple:
    return tuple((a.shape, str(a.dtype)) for a in jax.tree.leaves(tree))
