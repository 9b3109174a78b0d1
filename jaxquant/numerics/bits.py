"""Bits as an argument of a compiled program, so that one program serves all widths of codes.

For most weights, compiling a method takes longer than running it, and between widths only the limits of the codes
differ. So a program is compiled for a config that has WIDEST bits, and is given the true ones as integers, which are
traced. It returns codes that are not packed; that is done when it has run.

A method class that works so declares `any_bits = True` itself (subclasses may read their bits, and declare for
themselves). It reads the bits of its spec through `min_code`, `max_code` and `steps` alone, and returns a QTensor of
that spec. All other methods are compiled for each width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxquant.numerics.qtensor import QTensor, is_packed
from jaxquant.numerics.spec import QuantSpec

WIDEST = 8


class _TracedSpec(QuantSpec):
    """A spec of traced bits, inside of a compiled program."""

    def _check_bits(self):
        pass


def split_bits(config: Any) -> tuple[Any, tuple[Any, ...]]:
    """A method config with WIDEST bits in each of its specs, hashable, and the bits that they had."""
    bits = []

    def take(spec: QuantSpec) -> QuantSpec:
        bits.append(spec.bits)
        return _with_bits(QuantSpec, spec, WIDEST)

    return (_map_specs(take, config), tuple(bits)) if _any_bits(config) else (config, ())


def join_bits(config: Any, bits: tuple[Any, ...]) -> Any:
    """The config that `split_bits` took apart; the bits may be traced."""
    if not _any_bits(config):
        return config
    rest = iter(bits)
    return _map_specs(lambda spec: _with_bits(_TracedSpec, spec, next(rest)), config)


def traced_bits(spec: QuantSpec, bits: jax.Array) -> QuantSpec:
    """The spec with bits that are traced, an integer `[]`."""
    return _with_bits(_TracedSpec, spec, bits)


def unpacked(q: QTensor) -> QTensor:
    """What a method has made with traced bits, with WIDEST in its spec: the result of a compiled program."""
    return dataclasses.replace(q, spec=_with_bits(QuantSpec, q.spec, WIDEST)) if _is_traced(q.spec) else q


def packed(q: QTensor, config: Any) -> QTensor:
    """The result of a compiled program with the true bits in its spec, those of the config, and packed as they ask."""
    if not _any_bits(config):
        return q
    values = _pack(q, config.spec) if is_packed(config.spec) else q.values
    return dataclasses.replace(q, values=values, spec=config.spec)


@functools.partial(jax.jit, static_argnums=1)
def _pack(q: QTensor, spec: QuantSpec) -> jax.Array:
    axes = {"contract": q.contract, "out": q.out, "in_shape": q.in_shape}
    return QTensor.from_codes(q.values, q.scale, q.zero_point, spec, dtype=q.dtype, **axes).values


def _any_bits(config: Any) -> bool:
    return all(vars(type(step)).get("any_bits", False) for step in getattr(config, "steps", [config]))


def _is_traced(spec: QuantSpec) -> bool:
    return isinstance(spec, _TracedSpec)


def _with_bits(kind: type[QuantSpec], spec: QuantSpec, bits: Any) -> QuantSpec:
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return kind(**fields | {"bits": bits})


def _map_specs(fn: Callable[[QuantSpec], QuantSpec], config: Any) -> Any:
    if hasattr(config, "steps"):
        return type(config)(*(_map_specs(fn, step) for step in config.steps))
    return dataclasses.replace(config, spec=fn(config.spec))
