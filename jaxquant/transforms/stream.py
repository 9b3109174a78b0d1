"""Quantizes a model block by block: memory for the parameters and statistics of one block, whatever their number."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxquant.methods.choice import MixedPrecision
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.transforms import memory
from jaxquant.transforms.calibrate import Calibration, Statistics, tokens, types_of_statistics
from jaxquant.transforms.memory import MemoryEstimate
from jaxquant.transforms.programs import needed_memory
from jaxquant.transforms.quantize import configs_of, plan, run_jobs
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.report import Report, joined_reports
from jaxquant.transforms.tracing.interpreter import named_leaves
from jaxquant.transforms.tracing.stages import Stages

Predecessors = Literal["quantized", "float"]
Progress = Callable[[int, int], None]


class Needs(NamedTuple):
    """What calibrating one block takes.

    Attributes:
      memory: for one batch.
      held: bytes of one batch that are kept from one step to the next, at most.
      statistics: bytes of all statistics, which need not be in memory together.
    """

    memory: MemoryEstimate
    held: int
    statistics: int


class _Step(NamedTuple):
    """Weights of a block that are calibrated together.

    Attributes:
      recipe: theirs.
      calibration: gives their statistics, and what the next step begins with.
    """

    recipe: Any
    calibration: Calibration


class Stream:
    """Blocks that run one after the other and are quantized in that order, one in memory at a time.

    A weight is calibrated with what all those before it make of the data, in its own block too: those that are
    quantized, so that it can make up for some of their errors (as in GPTQ, arXiv:2210.17323, with the option "true
    sequential" of its authors' code); or the float ones. The latter gives exactly what `calibrate` and
    `quantize_params` give for the whole model.

    Beside one block and its statistics, `inputs` are in memory: all that has to be kept to go on with later. While a
    block is quantized behind quantized weights, inputs of products within it are there in their place.

    Attributes:
      inputs: the next block's input for each batch; None without calibration. `quantize` replaces them, and they may
        be set, to go on where another stream has ended.
    """

    def __init__(
        self,
        fn: Callable[[Any, Any], Any],
        recipe: Any,
        inputs: Sequence[Any] | None,
        *,
        masks: Sequence[Any] | None = None,
        predecessors: Predecessors = "quantized",
    ):
        """Prepares to quantize blocks.

        Args:
          fn: `fn(params, x) -> x`, one block; any JAX function of arrays, or of pytrees of them.
          recipe: as for `quantize_params`; its patterns match paths within a block.
          inputs: of the block that comes next, for each batch. None for methods that need no statistics.
          masks: for each batch, which positions are tokens, as for `calibrate`. None: all of them.
          predecessors: what made the inputs.

        Raises:
          ValueError: `predecessors` is neither.
        """
        if predecessors not in get_args(Predecessors):
            raise ValueError(f"predecessors={predecessors!r} is not one of {', '.join(get_args(Predecessors))}")
        self.inputs = None if inputs is None else list(inputs)
        self._masks = None if masks is None else [None if m is None else jnp.asarray(m, bool) for m in masks]
        self._fn, self._recipe, self._behind_float = fn, recipe, predecessors == "float"
        self._steps: list[_Step] = []
        self._stages: Stages | None = None
        self._types: Statistics
        self._checked: set[int] = set()  # steps whose memory was looked at: it is the same in all blocks

    def prepare(self, params: Any, x: Any, real: Any = None) -> Needs:
        """What calibration takes for one block: its parameters, an input of it, and its mask."""
        self._plan(params, x)
        if self._stages is None:
            estimate = self._steps[0].calibration.prepare(params, x, None if real is None else jnp.asarray(real, bool))
            return Needs(estimate, memory.types_bytes(x), estimate.parts["statistics"])
        sizes = [self._statistics_bytes(weights) for weights in self._stages.weights]
        working = [max(peak, size) for peak, size in zip(self._stages.peaks, [*sizes, 0], strict=True)]
        parts = {"statistics": max(sizes), "activations or results": max(working)}
        estimate = MemoryEstimate("calibrate", parts, "use batches of fewer or shorter sequences")
        return Needs(estimate, max(memory.types_bytes(x), *self._stages.held), sum(sizes))

    def quantize(self, params: Any, *, last: bool = False, progress: Progress | None = None) -> tuple[Any, Report]:
        """Quantizes the next block.

        Args:
          params: its parameters, like those of the others in structure and shapes.
          last: no other follows, so `inputs` need not be replaced.
          progress: called with (batches done, batches in all) in calibration.

        Returns:
          The tree and the report, as `quantize_params`.

        Raises:
          ValueError: as `calibrate` and `quantize_params`.
        """
        if self.inputs is None:
            return self._solved(params, None, self._recipe, 0)
        for x in self.inputs:
            self._plan(params, x)
        masks = [None] * len(self.inputs) if self._masks is None else self._masks
        rows = [(real, tokens(x, real)) for x, real in zip(self.inputs, masks, strict=True)]
        tree, reports = params, []
        for i, step in enumerate(self._steps):
            inputs, self.inputs = self.inputs, []
            stats, self.inputs = step.calibration.run(tree, self._taken(inputs, rows, progress, i * len(rows)))
            memory.give_back()  # or what calibration has freed would be taken again and again
            tree, report = self._solved(tree, stats, step.recipe, i)
            reports.append(report)
            del stats
            memory.give_back()
        if self._stages is not None and not last:
            after = quantized(self._stages.result)
            for i, held in enumerate(self.inputs):
                self.inputs[i] = jax.block_until_ready(after(tree, held))
        return tree, joined_reports(reports, [path for path, _ in named_leaves(params)])

    def _plan(self, params: Any, x: Any) -> None:
        """Finds the steps in which a block is quantized, for inputs like x; the steps are those of every block."""
        if self._steps:
            if self._stages is not None:
                self._stages.trace(params, x)
            return
        if self._behind_float:
            calibration = Calibration(self._fn, self._recipe, keep=lambda result: result, level=logging.DEBUG)
            self._steps = [_Step(self._recipe, calibration)]
            return
        self._types = types_of_statistics(self._fn, params, x, self._recipe)
        configs = configs_of(dict(named_leaves(params)), self._types, self._recipe)
        groups = {path: config if isinstance(config, MixedPrecision) else path for path, config in configs.items()}
        self._stages = Stages(self._fn, groups)
        self._stages.trace(params, x)
        for i, weights in enumerate(self._stages.weights):
            recipe = [(re.escape(path), config) for path, config in configs.items() if path in weights]
            run = quantized(partial(self._stages.run, i))
            self._steps.append(_Step(recipe, Calibration(run, recipe, keep=lambda r: r[0], level=logging.DEBUG)))

    def _statistics_bytes(self, weights: set[str]) -> int:
        """Bytes of the statistics of some weights; those that share an input share them."""
        inputs = [product.inputs for path, product in self._types.products.items() if path in weights]
        return sum(map(memory.types_bytes, {id(shared): shared for shared in inputs}.values()))

    def _solved(self, params: Any, stats: Statistics | None, recipe: Any, step: int) -> tuple[Any, Report]:
        jobs = plan(dict(named_leaves(params, is_qtensor)), stats, recipe)
        if step not in self._checked:
            memory.ensure_fits(needed_memory(jobs), params, logging.DEBUG)
            self._checked.add(step)
        return run_jobs(jobs, params, stats, None)

    def _taken(self, inputs: list, rows: list[tuple[Any, int]], progress: Progress | None, before: int) -> Iterator:
        """The inputs, with masks and numbers of tokens; each is let go when the next is asked for.

        The results of the step take their place.
        """
        total = len(rows) * len(self._steps)
        for done, (real, count) in enumerate(rows):
            if progress is not None:
                progress(before + done, total)
            yield inputs.pop(0), real, count
        if progress is not None:
            progress(before + len(rows), total)
