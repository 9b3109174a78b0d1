"""Quantizes a model block by block: memory for the parameters and statistics of one block, whatever their number."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.qtensor import QTensor, is_qtensor
from jaxquant.transforms import memory
from jaxquant.transforms.calibrate import Calibration
from jaxquant.transforms.jobs import Job
from jaxquant.transforms.memory import MemoryEstimate
from jaxquant.transforms.quantize import needed_memory, plan, run_jobs
from jaxquant.transforms.report import Report
from jaxquant.transforms.tracing.interpreter import named_leaves

Progress = Callable[[int, int], None]


def quantize_blocks(
    fn: Callable[[Any, Any], Any],
    blocks: Iterable[Any],
    inputs: Iterable[Any] | None,
    recipe: Any,
    *,
    count: int = 1,
    beside: int = 0,
    progress: Progress | None = None,
) -> Iterator[tuple[Any, Report]]:
    """Quantizes blocks that run one after the other, each with the statistics of the float model.

    The result is that of `calibrate` and `quantize_params` for the whole model; what differs is that only one block and
    its statistics are in memory at a time, beside the inputs of that block for all batches.

    Args:
      fn: `fn(params, x) -> x`, one block.
      blocks: the parameters of each block, alike in structure and shapes; the next is asked for when this one is done.
      inputs: the first block's input for each batch; None for methods that need no statistics, as in `quantize_params`.
      recipe: as for `quantize_params`; its patterns match paths within a block.
      count: how many blocks there are, and
      beside: bytes that the rest of the model will take, both for the estimate of memory.
      progress: called with (batches done, batches in all) of each block.

    Yields:
      `(tree, report)` of each block, as `quantize_params` returns them.

    Raises:
      ValueError: as `calibrate` and `quantize_params`.
    """
    calibration = Calibration(fn, recipe, keep_results=True)
    waiting = None if inputs is None else list(inputs)

    def quantize(params: Any, check: bool) -> tuple[Any, Report]:  # what it leaves behind is gone when it returns
        stats = None
        if waiting is not None:
            stats, waiting[:] = calibration.run(params, _drained(waiting, progress))
        jobs = plan(dict(named_leaves(params)), stats, recipe)
        if check:
            memory.ensure_fits(_needed_memory(jobs, count, beside), params)
        return run_jobs(jobs, params, stats, None)

    yield from map(quantize, blocks, itertools.chain([True], itertools.repeat(False)))  # they are all alike


def _needed_memory(jobs: list[Job], count: int, beside: int) -> MemoryEstimate:
    """What is still to be allocated for all blocks: of their results there are two in the end, apart and in a stack."""
    one = needed_memory(jobs)
    parts = {**one.parts, "quantized weights": 2 * count * one.parts["quantized weights"], "other parameters": beside}
    remedy = "the layers are quantized one at a time already; fewer bits take less, or a machine with more memory"
    return MemoryEstimate(one.call, {name: size for name, size in parts.items() if size}, remedy)


def stack_blocks(quantized: Sequence[tuple[Any, Report]]) -> tuple[Any, Report]:
    """Puts together blocks that are parts of one stack, with a leading axis of layers on every leaf.

    Args:
      quantized: what `quantize_blocks` yielded, in order.

    Returns:
      The tree of the whole stack and a Report, as if it had been quantized at once.
    """
    trees, reports = zip(*quantized, strict=True)
    tree = jax.tree.map(_stacked, *trees, is_leaf=is_qtensor)
    layers, first = [], 0
    for part, report in quantized:
        layers += [dataclasses.replace(row, index=(row.index[0] + first, *row.index[1:])) for row in report.layers]
        first += len(jax.tree.leaves(part)[0])
    order = {path: i for i, path in enumerate(dict.fromkeys(row.path for row in layers))}
    return tree, Report(
        layers=tuple(sorted(layers, key=lambda row: order[row.path])),
        unchanged=reports[0].unchanged,
        notes=reports[0].notes,
        bytes_before=sum(report.bytes_before for report in reports),
        bytes_after=sum(report.bytes_after for report in reports),
    )


def _stacked(*parts: Any) -> Any:
    """One leaf of all blocks. Of outliers each block has its own number; what lacks is filled up with no channel."""
    if is_qtensor(parts[0]) and parts[0].outlier_index is not None:
        axis = parts[0].values.ndim - 1 - len(parts[0].out)
        most = max(q.outlier_index.shape[axis] for q in parts)
        parts = tuple(_filled(q, axis, most) for q in parts)
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def _filled(q: QTensor, axis: int, size: int) -> QTensor:
    """The QTensor with `size` outliers along an axis of its arrays."""
    index, rows = q.outlier_index, q.outlier_weight
    assert index is not None
    assert rows is not None
    pad = [(0, size - index.shape[axis] if a == axis else 0) for a in range(index.ndim)]
    index = jnp.pad(index, pad, constant_values=math.prod(q.in_shape))
    return dataclasses.replace(q, outlier_index=index, outlier_weight=jnp.pad(rows, pad))


def _drained(batches: list, progress: Progress | None) -> Iterator[Any]:
    """The batches, each let go when the next is asked for."""
    total = len(batches)
    for done in range(total):
        if progress is not None:
            progress(done, total)
        yield batches.pop(0)
    if progress is not None:
        progress(total, total)
