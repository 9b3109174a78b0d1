"""Bits as an argument of a compiled program, so that one program serves all widths of codes.

For most weights, compiling a method takes longer than running it, and between widths only the limits of the codes
differ. So a program is compiled for a config that has MOST bits, and is given the true ones as integers, which are
traced. It returns codes that are not packed; that is done when it has run.

Methods whose code does not otherwise depend on the bits say so by `any_bits = True`; others are compiled for each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxquant.numerics.qtensor import QTensor, is_packed
from jaxquant.numerics.spec import QuantSpec

MOST = 8


def split_bits(config: Any) -> tuple[Any, tuple[Any, ...]]:
    """A method config with MOST bits in each of its specs, hashable, and the bits that they had."""
    bits = []

    def take(spec: QuantSpec) -> QuantSpec:
        bits.append(spec.bits)
        return dataclasses.replace(spec, bits=MOST)

    return (_map_specs(take, config), tuple(bits)) if _any_bits(config) else (config, ())


def join_bits(config: Any, bits: tuple[Any, ...]) -> Any:
    """The config that `split_bits` took apart; the bits may be traced."""
    if not _any_bits(config):
        return config
    rest = iter(bits)
    return _map_specs(lambda spec: dataclasses.replace(spec, bits=next(rest)), config)


def unpacked(q: QTensor) -> QTensor:
    """What a method has made with traced bits, with MOST of them in its spec: the result of a compiled program."""
    return q if isinstance(q.spec.bits, int) else dataclasses.replace(q, spec=dataclasses.replace(q.spec, bits=MOST))


def packed(q: QTensor, config: Any) -> QTensor:
    """That result with the spec of its config."""
    if not _any_bits(config):
        return q
    values = _pack(q, config.spec) if is_packed(config.spec) else q.values
    return dataclasses.replace(q, values=values, spec=config.spec)


@functools.partial(jax.jit, static_argnums=1)
def _pack(q: QTensor, spec: QuantSpec) -> jax.Array:
    axes = {"contract": q.contract, "out": q.out, "in_shape": q.in_shape}
    return QTensor.from_codes(q.values, q.scale, q.zero_point, spec, dtype=q.dtype, **axes).values


def _any_bits(config: Any) -> bool:
    return all(getattr(step, "any_bits", False) for step in getattr(config, "steps", [config]))


def _map_specs(fn: Callable[[QuantSpec], QuantSpec], config: Any) -> Any:
    if hasattr(config, "steps"):
        return type(config)(*(_map_specs(fn, step) for step in config.steps))
    return dataclasses.replace(config, spec=fn(config.spec))
