"""Runs any model function with quantized weights in its parameters."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxquant.kernels.matmul import quantized_matmul, quantized_ragged_matmul
from jaxquant.numerics.qtensor import holds_qtensors, is_qtensor
from jaxquant.transforms.arguments import Static, is_hashable
from jaxquant.transforms.tracing import compat, interpreter, payloads
from jaxquant.transforms.tracing.views import View


def quantized(fn: Callable, *, allow_dense: bool = False) -> Callable:
    """Transforms a model function so that QTensors may stand in its parameters.

    Every product with a quantized weight runs in a quantized kernel; everything else in `fn` runs unchanged. The result
    works under `jit`, `vmap` and `scan`, and is differentiable in the inputs and in float parameters. Without a QTensor
    in the parameters it is `fn` itself.

    Args:
      fn: `fn(params, *inputs, **options)`, any JAX function. Inputs that are no arrays are static and must be hashable.
      allow_dense: where a weight is used in a way that no kernel covers, make a dense copy and warn, not fail.

    Returns:
      A function of the same signature. Equal functions share what was compiled, so `quantized(fn)` may be written
      where it is called.

    Raises:
      TypeError: (when called) a quantized weight enters an operation that is no known product, lookup or renaming, or
        is summed over other axes than those it was quantized along (as `jax.grad` inside `fn` does). The message names
        the primitive and the parameter's path. Also where an input that is no array cannot be hashed, and where a
        derivative goes through a function with a derivative rule of its own that takes a quantized weight.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> def apply(params, x):
      ...     return x @ params["w"]
      >>> qparams = {"w": jq.quantize(jnp.array([[127.0], [64.0]]), jq.int8(narrow_range=True))}
      >>> jq.quantized(apply)(qparams, jnp.array([[1.0, 2.0]])).tolist()
      [[255.0]]
    """
    compiled = (_compiled_once if is_hashable(fn) else _compiled)(fn, allow_dense)

    @functools.wraps(fn)
    def run(params, *inputs, **options):
        if not holds_qtensors(params):
            return fn(params, *inputs, **options)
        arrays, rest = Static.split((inputs, options))
        return compiled(params, arrays, rest)

    return run


def _compiled(fn: Callable, allow_dense: bool) -> Callable:
    @functools.partial(jax.jit, static_argnums=2)
    def compiled(params, arrays, rest):
        inputs, options = rest.join(arrays)
        return _interpret(functools.partial(fn, **options), params, inputs, _Executor(allow_dense))

    return compiled


_compiled_once = functools.lru_cache(maxsize=64)(_compiled)


def _interpret(fn, params, inputs, executor):
    closed, structure, leaves, arrays = interpreter.trace(fn, params, inputs, is_qtensor)
    outs, _ = interpreter.start(executor, closed, leaves, arrays, lambda _, leaf: is_qtensor(leaf))
    return jax.tree.unflatten(structure, [executor.result(o) for o in outs])


class _Executor:
    """The handler that runs products in quantized kernels."""

    def __init__(self, allow_dense: bool):
        self.allow_dense = allow_dense

    def rename(self, it, steps, eqn, ins):
        """The payload stays as it is, except for slices along leading and output axes."""
        outs = []
        for view, takes in steps:
            held = ins[0]
            for take in takes:
                held = payloads.take(held, take)
                if held is None:
                    return it.other(eqn, ins, "it cuts the weight along an axis that groups and packed codes run over")
            outs.append(dataclasses.replace(view, payload=held.payload))
        return outs

    def product(self, it, product):
        """The kernel's product."""
        view, own = product.view, payloads.contract_axes(product.view)
        if [a for a in product.contract_axes if view.sizes[a] > 1] != [a for a in own if view.sizes[a] > 1]:
            why = f"it sums over axes {product.contract_axes} of the weight, which was quantized along axes {own}"
            return it.other(product.eqn, product.ins, why)
        q = payloads.arranged(view, product.stack_factors)
        if q is None:
            return it.other(product.eqn, product.ins, "it batches over an axis that the weight was quantized along")
        of_inputs = (q.input_scale, q.channel_scale, q.input_order)
        outer = [a.shape[len(product.stack_factors) + 1 :] for a in of_inputs if a is not None]
        if any(n > 1 for sizes in outer for n in sizes):
            why = "its matrices have input scales of their own, but it multiplies one input with several of them"
            return it.other(product.eqn, product.ins, why)
        kept = {name: product.eqn.params[name] for name in ("preferred_element_type", "precision")}

        def run(x, q, groups):
            rows = dataclasses.replace(product, x=x).rows()
            if groups is None:
                return product.restore(quantized_matmul(rows, q, **kept))
            return product.restore(quantized_ragged_matmul(rows, q, groups, **kept))

        return [_typed(run, product.eqn)(product.x, q, product.groups)]

    def lookup(self, it, lookup, eqn, ins):
        """Only the rows asked for are dequantized."""
        if payloads.payload_axis(lookup.view, lookup.axis) is None:
            return it.other(eqn, ins, "it looks up positions along an axis that groups and packed codes run over")

        def run(view, ids):
            rows = payloads.take_rows(view, lookup.axis, ids)
            if lookup.fill is not None:
                inside = (ids >= 0) & (ids < view.sizes[lookup.axis])
                inside = jnp.expand_dims(inside, tuple(range(inside.ndim, rows.ndim)))
                rows = jnp.where(inside, rows, jnp.asarray(lookup.fill, rows.dtype))
            return jnp.moveaxis(rows, range(ids.ndim, rows.ndim), lookup.offset_dims)

        return [_typed(run, eqn)(lookup.view, lookup.ids)]

    def dense(self, eqn, values, why):
        """Dense copies if they are allowed, and an error if not."""
        return self._dense(f"`{eqn.primitive.name}` meets", values, why)

    def result(self, out):
        """A result of the function: a weight may be returned whole."""
        if isinstance(out, View) and out.untouched and not out.leads:
            return dataclasses.replace(out.payload, dtype=out.dtype)
        return self._dense("the function returns a part of", [out], "return it whole, or not at all")[0]

    def _dense(self, what: str, values: list, why: str) -> list:
        paths = ", ".join(f"'{p}'" for p in interpreter.paths_of(values))
        if not paths:
            return values
        message = f"{what} the quantized weight {paths}: {why}"
        if not self.allow_dense:
            raise TypeError(
                f"{message}. Leave the weight out of the recipe, or call quantized(fn, allow_dense=True) to make a "
                "dense copy of it here"
            )
        warnings.warn(f"{message}; a dense copy was made", stacklevel=2)
        return [payloads.densify(v) if isinstance(v, View) else v for v in values]


def _typed(run: Callable, eqn) -> Callable:
    """`run`, whose result has the sharding that the equation's has, under a mesh with explicit axes."""
    result = eqn.outvars[0].aval
    return compat.compiler_sharded(run, result, result.sharding.spec)
