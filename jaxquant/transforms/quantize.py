"""Applies methods to the weights of a parameter tree, equal shapes together."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.kernels.reference import dense
from jaxquant.methods.rtn import RTN
from jaxquant.numerics.layout import to_canonical
from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.numerics.statistics import InputStatistics
from jaxquant.transforms.calibrate import Statistics
from jaxquant.transforms.recipe import resolve
from jaxquant.transforms.report import LayerReport, Report
from jaxquant.transforms.tracing.interpreter import is_matrix, named_leaves

CHUNK_BYTES = 2**29  # matrices and statistics that one compiled call works on, at most
NOT_WEIGHTS = ("scale", "bias", "embedding")  # Flax's names of leaves that a bare config passes over without statistics
FALLBACKS = (
    None,
    "no calibration tokens",
    "no held-out tokens to judge by",
    "worse than RTN on held-out tokens",
    "statistics are not finite",
)


def quantize_params(
    params: Any, stats: Statistics | None, recipe: Any, *, progress: Callable[[int, int], None] | None = None
) -> tuple[Any, Report]:
    """Quantizes the weights of a parameter tree.

    No matrix is ever kept that does worse than rounding to nearest on held-out calibration tokens: it falls back to
    that, and so does one whose input saw no token. The report says so.

    Args:
      params: any pytree of arrays.
      stats: from `calibrate`, with the same tree. None for methods that need none: weights are then Flax's
        `[..., in, out]`, and a bare config takes every float leaf of two or more axes that is not named "scale",
        "bias" or "embedding".
      recipe: a method config for every weight that a product consumes, or rules `[(pattern, config or None), ...]`;
        see `recipe.resolve`. Embeddings whose rows are only looked up are quantized per row if a rule names them.
      progress: called with (matrices done, matrices in all).

    Returns:
      The tree with QTensors in place of the weights taken, and a Report.

    Raises:
      ValueError: a weight with entries that are not finite, a group size that does not divide the inputs, a method
        without the statistics it needs, a rule that takes nothing. Nothing is computed before all of it is checked.
    """
    named = dict(named_leaves(params, is_qtensor))
    jobs = _plan(named, stats, recipe)
    pieces: dict[str, list[QTensor]] = {job.path: [] for job in jobs}
    layers: dict[str, list[LayerReport]] = {job.path: [] for job in jobs}
    total, done = sum(job.count for job in jobs), 0
    for chunk, size in _chunks(jobs):
        for (job, _), q, layer in zip(chunk, *_solve(chunk, size), strict=True):
            pieces[job.path].append(q)
            layers[job.path].append(layer)
        done += len(chunk)
        if progress is not None:
            progress(done, total)
    quantized = {job.path: job.assemble(pieces[job.path]) for job in jobs}
    structure = jax.tree.structure(params, is_leaf=is_qtensor)
    tree = jax.tree.unflatten(structure, [quantized.get(path, leaf) for path, leaf in named.items()])
    order = tuple(layer for path in named for layer in layers.get(path, ()))
    unchanged = tuple(path for path in named if path not in quantized)
    return tree, Report(order, unchanged, _notes(stats), _nbytes(params), _nbytes(tree))


def _notes(stats: Statistics | None) -> dict[str, str]:
    notes: dict[str, list[str]] = {}
    for path, note in stats.notes if stats is not None else ():
        notes.setdefault(path, []).append(note)
    return {path: "; ".join(parts) for path, parts in notes.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One weight to quantize: the leaf, its config, its axes' roles, and its statistics `[*lead, ...]`."""

    path: str
    leaf: Any
    config: Any
    contract: tuple[int, ...]  # negative
    out: tuple[int, ...]
    inputs: InputStatistics | None

    @property
    def in_shape(self) -> tuple[int, ...]:
        return tuple(self.leaf.shape[a] for a in self.contract)

    @property
    def lead(self) -> tuple[int, ...]:
        named = self.contract + self.out
        return tuple(n for i, n in enumerate(self.leaf.shape) if i - self.leaf.ndim not in named)

    @property
    def count(self) -> int:
        return math.prod(self.lead)

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.in_shape), math.prod(self.leaf.shape[a] for a in self.out)

    @property
    def kind(self) -> tuple:
        """Jobs of one kind run in one compiled program."""
        dtype = None if self.inputs is None else self.inputs.gram.dtype
        return self.config, self.shape, self.leaf.dtype, dtype

    def matrices(self) -> tuple[jax.Array, InputStatistics | None]:
        """The weight as `[count, in, out]` and its statistics as `[count, ...]`."""
        w = to_canonical(jnp.asarray(self.leaf), self.contract, self.out).reshape(self.count, *self.shape)
        lead = len(self.lead)
        return w, jax.tree.map(lambda a: a.reshape(self.count, *a.shape[lead:]), self.inputs)

    def assemble(self, pieces: list[QTensor]) -> QTensor:
        """The weight's QTensor, from those of its matrices `[in, out]`."""
        out_shape = tuple(self.leaf.shape[a] for a in self.out)

        def joined(*arrays):
            a = jnp.stack(arrays)
            wide = out_shape if a.shape[-1] == math.prod(out_shape) else (1,) * len(out_shape)
            return a.reshape(*self.lead, a.shape[1], *wide)

        q = jax.tree.map(joined, *pieces)
        return dataclasses.replace(q, contract=self.contract, out=self.out, in_shape=self.in_shape)


def _plan(named: dict[str, Any], stats: Statistics | None, recipe) -> list[_Job]:
    """The jobs of a recipe, checked."""
    floats = {p: leaf for p, leaf in named.items() if not is_qtensor(leaf) and is_matrix(leaf)}
    if stats is not None:
        quantizable = {p for p in floats if p in stats.products}
        if isinstance(recipe, list | tuple):
            quantizable |= {p for p in floats if p in stats.lookups}
    elif isinstance(recipe, list | tuple):
        quantizable = set(floats)
    else:
        quantizable = {p for p in floats if p.rpartition("/")[2] not in NOT_WEIGHTS}
    taken = resolve(recipe, named, quantizable)
    if not taken:
        raise ValueError("the recipe quantizes nothing: every rule that matches has None for its config")
    jobs = [_job(path, named[path], config, stats) for path, config in taken.items()]
    for job in jobs:
        _check(job)
    return jobs


def _job(path: str, leaf, config, stats: Statistics | None) -> _Job:
    ndim = np.ndim(leaf)
    if stats is None:
        return _Job(path, leaf, config, (-2,), (-1,), None)
    if path not in stats.products:  # an embedding: one scale, or row of groups, per row
        return _Job(path, leaf, config, (-1,), tuple(range(-ndim, -1)), None)
    product = stats.products[path]
    contract, out = (tuple(a - ndim for a in axes) for axes in (product.contract, product.out))
    return _Job(path, leaf, config, contract, out, product.inputs)


def _check(job: _Job) -> None:
    if job.inputs is None and job.config.needs_statistics:
        raise ValueError(
            f"'{job.path}': {type(job.config).__name__} needs calibration statistics; pass jq.calibrate(...) as `stats`"
        )
    if job.inputs is not None and job.inputs.gram.shape != (*job.lead, job.shape[0], job.shape[0]):
        raise ValueError(
            f"'{job.path}': its statistics are for {job.inputs.gram.shape[-1]} inputs, the weight has {job.shape[0]}; "
            "calibrate with the tree that is to be quantized"
        )
    try:
        job.config.spec.num_groups(job.shape[0])
    except ValueError as error:
        raise ValueError(f"'{job.path}': {error}") from None
    bad = int(jnp.sum(~jnp.isfinite(job.leaf)))
    if bad:
        raise ValueError(
            f"'{job.path}': {bad} of its {job.leaf.size} entries are not finite; repair or exclude the weight"
        )


def _chunks(jobs: list[_Job]) -> Iterator[tuple[list[tuple[_Job, int]], int]]:
    """Matrices `(job, position)` of one kind, as many as one call may work on."""
    kinds: dict[tuple, list[_Job]] = {}
    for job in jobs:
        kinds.setdefault(job.kind, []).append(job)
    for (_, (k, n), _, _), members in kinds.items():
        matrices = [(job, i) for job in members for i in range(job.count)]
        size = max(1, min(len(matrices), CHUNK_BYTES // (4 * k * (k + n))))
        for start in range(0, len(matrices), size):
            yield matrices[start : start + size], size


def _solve(chunk: list[tuple[_Job, int]], size: int) -> tuple[list[QTensor], list[LayerReport]]:
    start = time.perf_counter()
    whole = {id(job): job.matrices() for job, _ in chunk}
    parts = [jax.tree.map(lambda a, i=i: a[i], whole[id(job)]) for job, i in chunk]
    parts += parts[-1:] * (size - len(parts))  # the last chunk runs in the same program as the others
    w, inputs = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    q, facts = jax.block_until_ready(_run(chunk[0][0].config, w, inputs))
    facts = jax.tree.map(np.asarray, facts)
    seconds = (time.perf_counter() - start) / len(chunk)
    pieces = [jax.tree.map(lambda a, i=i: a[i], q) for i in range(len(chunk))]
    rows = [_row(job, at, {k: v[i] for k, v in facts.items()}, seconds) for i, (job, at) in enumerate(chunk)]
    return pieces, rows


@functools.partial(jax.jit, static_argnums=0)
def _run(config, w: jax.Array, inputs: InputStatistics | None):
    return jax.vmap(functools.partial(_one, config))(w, inputs)


def _one(config, w: jax.Array, inputs: InputStatistics | None) -> tuple[QTensor, dict[str, jax.Array]]:
    """One matrix: the method's answer or rounding to nearest, whichever is better on held-out tokens."""
    q, info = config.quantize(w, inputs)
    if inputs is None:
        return q, {f"info/{k}": v for k, v in info.items()}
    nearest, _ = RTN(config.spec).quantize(w, None)
    x = inputs.held_out
    scale = _energy(x, w)
    error, rtn_error = (_energy(x, dense(a).astype(x.dtype) - w.astype(x.dtype)) / scale for a in (q, nearest))
    fallback = jnp.where(error <= rtn_error, 0, 3)
    fallback = jnp.where(jnp.isfinite(error) & jnp.isfinite(rtn_error), fallback, 4)
    fallback = jnp.where(scale > 0, fallback, 2)
    fallback = jnp.where(inputs.count > 0, fallback, 1)
    if isinstance(config, RTN):
        fallback = jnp.zeros_like(fallback)
    q = jax.tree.map(lambda a, b: jnp.where(fallback > 0, b, a), q, nearest)
    facts = {"tokens": inputs.count, "dropped": inputs.dropped, "rtn_error": rtn_error, "fallback": fallback}
    facts["error"] = jnp.where(fallback > 0, rtn_error, error)
    return q, facts | {f"info/{k}": v for k, v in info.items()}


def _energy(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.matmul(x, w.astype(x.dtype), precision=lax.Precision.HIGHEST)))


def _row(job: _Job, at: int, facts: dict[str, Any], seconds: float) -> LayerReport:
    def number(key):
        return float(facts[key]) if key in facts and np.isfinite(facts[key]) else None

    tokens, dropped = number("tokens"), number("dropped")
    spec = job.config.spec
    return LayerReport(
        path=job.path,
        index=tuple(int(i) for i in np.unravel_index(at, job.lead)) if job.lead else (),
        shape=job.shape,
        method=type(job.config).__name__,
        bits=spec.bits,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
        tokens=None if tokens is None else int(tokens),
        dropped_rows=None if dropped is None else int(dropped),
        rtn_error=number("rtn_error"),
        error=number("error"),
        fallback=FALLBACKS[int(facts.get("fallback", 0))],
        info={k.removeprefix("info/"): number(k) for k in facts if k.startswith("info/")},
        seconds=seconds,
    )


def _nbytes(tree) -> int:
    return sum(np.asarray(a).nbytes if not hasattr(a, "nbytes") else a.nbytes for a in jax.tree.leaves(tree))
