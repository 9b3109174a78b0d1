"""Splits a function where the product of one weight ends and the input of the next begins.

Weights are of one stage if none of their inputs follows from another's product. So they can be quantized stage by
stage, each behind what the quantized ones before it give, while the model runs once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jexc
import numpy as np
from jax import lax

from jaxquant.numerics.qtensor import holds_qtensors
from jaxquant.transforms.memory import types_bytes
from jaxquant.transforms.tracing import compat, interpreter
from jaxquant.transforms.tracing.products import DOT, RAGGED_DOT

EXPERTS = object()  # the group of all weights of ragged products


class Held(NamedTuple):
    """What one stage hands on to the next.

    Attributes:
      kind: which trace of the function it belongs to; static.
      arrays: the values.
    """

    kind: int
    arrays: list


class Stages:
    """The stages of a function `fn(params, x)`.

    Args:
      fn: any JAX function of arrays, or of pytrees of them.
      groups: for the path of each weight that is quantized, its group: weights of one group are of one stage.

    Attributes:
      weights: the paths of the weights of each stage, in order. After those comes a last stage without any.
      handed_on: bytes that each of these hands on to the next, for the largest input.
      peaks: bytes of the values of each stage, the last one's too, that are needed at one time if each equation runs by
        itself.
    """

    def __init__(self, fn: Callable, groups: Mapping[str, Any]):
        self.weights: list[set[str]] = []
        self.handed_on: list[int] = []
        self.peaks: list[int] = []
        self._fn, self._groups = fn, groups
        self._kinds: dict[tuple, int] = {}
        self._traces: list[tuple[list[Callable], Any]] = []  # functions of the stages, structure of the result

    def trace(self, params: Any, x: Any) -> int | None:
        """Splits the function for parameters and inputs like these, unless it has done so before.

        Returns:
          The number of this kind of call; None if it cannot be split: it has side effects, makes random numbers of
          typed keys, has parameters that are quantized already, or uses a weight in a way that cannot be followed.

        Raises:
          ValueError: the order of the weights is not that for earlier inputs.
        """
        key = (interpreter.kind_of(params), interpreter.kind_of(x))
        if key not in self._kinds:
            if holds_qtensors(params):
                return None
            closed, structure, leaves, arrays = interpreter.trace(self._fn, params, (x,))
            if not _is_plain(closed):
                return None
            flat = jax.make_jaxpr(functools.partial(_evaluate, closed))(*[leaf for _, leaf in leaves], *arrays)
            split = _Split(flat, [path if path in self._groups else None for path, _ in leaves], self._groups)
            if set().union(*split.weights) != set(self._groups):
                return None
            if self._traces and self.weights != split.weights:
                raise ValueError("the function uses its weights in another order for inputs of other shapes")
            self.weights, parts = split.weights, split.parts()
            self.handed_on = _most(self.handed_on, [_nbytes(part.results) for part in parts[:-1]])
            self.peaks = _most(self.peaks, [_peak(part.eqns, part.results) for part in parts])
            self._traces.append(([_callable(flat, len(leaves), part) for part in parts], structure))
            self._kinds[key] = len(self._traces) - 1
        return self._kinds[key]

    def begin(self, kind: int, x: Any) -> Held:
        """The input of the first stage, for inputs of a kind."""
        return Held(kind, interpreter.arrays_of(x))

    def run(self, stage: int, params: Any, held: Held) -> tuple[list, list]:
        """Runs a stage that has weights.

        Args:
          stage: its number, from 0.
          params: the parameters, in which the weights of the stages before it are quantized.
          held: what the stage before it handed on.

        Returns:
          The arrays to hand on, and what the stage's weights give as they are in `params`: for observers, which see
          the inputs; a compiled program that returns the arrays alone computes none of it.
        """
        return self._traces[held.kind][0][stage](params, held.arrays)

    def result(self, params: Any, held: Held) -> Any:
        """The function's result, by the last stage. Arguments as those of `run`."""
        functions, structure = self._traces[held.kind]
        return jax.tree.unflatten(structure, functions[-1](params, held.arrays)[0])


class _Part(NamedTuple):
    """A stage: its equations, what it needs of the stage before, what it hands on, and what its weights give."""

    eqns: list
    needs: list
    results: list
    given: list


class _Split:
    """The equations of a flat jaxpr by stages.

    A value's level is the number of products with weights, one after the other, that it follows from. The weights whose
    inputs are of one level are a stage, except that a group is never apart: in `q(k(q(x)))`, say, q and k are one, of
    levels 0 to 2. Such a stage begins with what is of its first level. The rest of its inputs it computes with weights
    that are not quantized, and the next stage computes them again. Experts are one group: which of the rows that were
    sorted for them are tokens, is known from what has sorted them.

    Args:
      flat: the jaxpr.
      paths: of its parameters, its first arguments; None if it is no weight.
      groups: of the weights, as for `Stages`.
    """

    def __init__(self, flat: jexc.ClosedJaxpr, paths: list[str | None], groups: Mapping[str, Any]):
        self._eqns, self._outvars = flat.jaxpr.eqns, flat.jaxpr.outvars
        self._inputs = flat.jaxpr.invars[len(paths) :]
        self._made_of = {v: {path} for v, path in zip(flat.jaxpr.invars, paths, strict=False) if path is not None}
        self._level = dict.fromkeys(self._inputs, 0)  # of what follows from inputs or products
        self._maker: dict[Any, Any] = {}
        self._products: list[tuple[int, set[str], Any]] = []  # level of the inputs, weights, equation
        for eqn in self._eqns:
            self._place(eqn)
        self._starts = self._first_levels(groups)
        self._ends = [*self._starts[1:], 1 + max((level for level, _, _ in self._products), default=0)]
        self.weights = [
            set().union(*(weights for level, weights, _ in self._products if start <= level < end))
            for start, end in zip(self._starts, self._ends, strict=True)
        ]

    def _place(self, eqn) -> None:
        read = _variables(eqn.invars)
        made_of: set[str] = set().union(*(self._made_of.get(v, ()) for v in read))
        below = [self._level[v] for v in read if v in self._level]
        level = max(below, default=0)
        is_product = bool(made_of) and (eqn.primitive.name in (DOT, RAGGED_DOT) or any(compat.inner_jaxprs(eqn)))
        if is_product:
            self._products.append((level, made_of, eqn))
        elif made_of:  # a part of a weight, say
            self._made_of.update(dict.fromkeys(eqn.outvars, made_of))
        if is_product or below:
            self._level.update(dict.fromkeys(eqn.outvars, level + is_product))
            self._maker.update(dict.fromkeys(eqn.outvars, eqn))

    def _first_levels(self, groups: Mapping[str, Any]) -> list[int]:
        """The level at which each stage begins."""
        experts = {path for _, weights, eqn in self._products if eqn.primitive.name == RAGGED_DOT for path in weights}
        spans: dict[Any, list[int]] = {}
        for level, weights, _ in self._products:
            for path in weights:
                spans.setdefault(EXPERTS if path in experts else groups[path], []).append(level)
        within = {level for span in spans.values() for level in range(min(span) + 1, max(span) + 1)}
        return sorted({level for level, _, _ in self._products} - within)

    def parts(self) -> list[_Part]:
        """All stages, in order."""
        last = self._part(self._outvars, [], self._starts[-1])
        found = [last]
        for start, end, known in reversed(list(zip(self._starts, self._ends, [-1, *self._starts[:-1]], strict=True))):
            given = [v for level, _, eqn in self._products if start <= level < end for v in _variables(eqn.outvars)]
            found.append(self._part(found[-1].needs, given, known))
        return found[::-1]

    def _part(self, results: list, given: list, known: int) -> _Part:
        """The stage that computes some values and no more, from those that are known: of levels up to `known`."""
        needs: dict[Any, None] = {}
        chosen: set[int] = set()
        wanted = _variables([*results, *given])
        while wanted:
            v = wanted.pop()
            eqn = self._maker.get(v)
            if eqn is None or (self._level[v] <= known and not _is_cheap(eqn)):
                needs |= {v: None} if v in self._level else {}
            elif id(eqn) not in chosen:
                chosen.add(id(eqn))
                wanted += _variables(eqn.invars)
        eqns = [eqn for eqn in self._eqns if id(eqn) in chosen or not any(v in self._level for v in eqn.outvars)]
        return _Part(eqns, self._inputs if known < 0 else list(needs), results, given)


def _is_cheap(eqn) -> bool:
    """Whether it is computed anew in each stage that reads it: what it was made of, no larger, is handed on."""
    return eqn.primitive.name in interpreter.RESHAPING and _nbytes(eqn.invars) <= _nbytes(eqn.outvars)


def _callable(flat: jexc.ClosedJaxpr, params: int, part: _Part) -> Callable:
    """`(params, arrays) -> (results, given)` of one part."""
    arguments = [*flat.jaxpr.constvars, *flat.jaxpr.invars[:params], *part.needs]
    call = compat.callable_of(flat, arguments, part.eqns, [*part.results, *part.given])

    def run(tree, arrays):
        outs = call(*flat.consts, *jax.tree.leaves(tree), *arrays)
        return outs[: len(part.results)], outs[len(part.results) :]

    return run


def _peak(eqns: Sequence, results: Sequence) -> int:
    """Bytes of the values that are needed at one time, beside what the equations are given."""
    last = {v: i for i, eqn in enumerate(eqns) for v in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(results), len(eqns))
    made: dict[int, list] = {}
    size = most = 0
    for i, eqn in enumerate(eqns):
        size += _nbytes(eqn.outvars)
        inner = [closed.jaxpr for closed in compat.inner_jaxprs(eqn)]
        most = max(most, size + max((_peak(jaxpr.eqns, jaxpr.outvars) for jaxpr in inner), default=0))
        for v in eqn.outvars:
            made.setdefault(last.get(v, i), []).append(v)
        size -= _nbytes(made.pop(i, []))
    return most


def _is_plain(closed: jexc.ClosedJaxpr) -> bool:
    """Whether all that a jaxpr does is to compute arrays of numbers."""
    return all(
        not eqn.effects
        and all(isinstance(getattr(v.aval, "dtype", None), np.dtype) for v in _variables([*eqn.invars, *eqn.outvars]))
        and all(map(_is_plain, compat.inner_jaxprs(eqn)))
        for eqn in closed.jaxpr.eqns
    )


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


def _nbytes(values: Sequence) -> int:
    return types_bytes([v.aval for v in _variables(values)])


def _most(a: list[int], b: list[int]) -> list[int]:
    return [max(pair) for pair in zip(a or b, b, strict=True)]
