"""Quantizes a model block by block: memory for the parameters and statistics of one block, whatever their number."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxquant.transforms import memory
from jaxquant.transforms.calibrate import Calibration, Statistics
from jaxquant.transforms.memory import MemoryEstimate
from jaxquant.transforms.quantize import needed_memory, plan, run_jobs
from jaxquant.transforms.report import Report
from jaxquant.transforms.tracing.interpreter import named_leaves

Predecessors = Literal["quantized", "float"]
Progress = Callable[[int, int], None]


class Stream:
    """Blocks that run one after the other and are quantized in that order, one in memory at a time.

    Each is calibrated with what the blocks before it make of the data: those that are quantized, so that it can make
    up for some of their errors (as in GPTQ, arXiv:2210.17323); or the float ones. The latter gives exactly what
    `calibrate` and `quantize_params` give for the whole model.

    Beside one block and its statistics, `inputs` are in memory: all that has to be kept to go on with later.

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
          fn: `fn(params, x) -> x`, one block; it takes QTensors in place of weights, as `quantized` functions do.
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
        self._fn, self._recipe = fn, recipe
        self._through_float = predecessors == "float"
        self._calibration = Calibration(fn, recipe, keep_results=self._through_float)
        self._announced = False

    def prepare(self, params: Any, x: Any, real: Any = None) -> MemoryEstimate:
        """What `calibrate` takes for one block: its parameters, an input of it, and its mask."""
        return self._calibration.prepare(params, x, None if real is None else jnp.asarray(real, bool))

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
        stats = self._calibrate(params, progress)
        memory.give_back()  # or what calibration has freed would be taken again and again
        jobs = plan(dict(named_leaves(params)), stats, self._recipe)
        if not self._announced:  # the others need the same
            memory.ensure_fits(needed_memory(jobs), params)
            self._announced = True
        tree, report = run_jobs(jobs, params, stats, None)
        del params, stats, jobs
        memory.give_back()
        if self.inputs is not None and not self._through_float and not last:
            for i, x in enumerate(self.inputs):
                self.inputs[i] = jax.block_until_ready(self._fn(tree, x))
        return tree, report

    def _calibrate(self, params: Any, progress: Progress | None) -> Statistics | None:
        if self.inputs is None:
            return None
        masks = [None] * len(self.inputs) if self._masks is None else self._masks
        batches = zip(self._taken(self.inputs, progress), masks, strict=True)
        stats, results = self._calibration.run(params, batches)
        if self._through_float:
            self.inputs = results
        return stats

    def _taken(self, inputs: list, progress: Progress | None) -> Iterator[Any]:
        """The batches; each is let go when the next is asked for, if the function's results take their place."""
        total = len(inputs)
        for done in range(total):
            if progress is not None:
                progress(done, total)
            yield inputs.pop(0) if self._through_float else inputs[done]
        if progress is not None:
            progress(total, total)
