"""Quantizes a model block by block: memory for the parameters and statistics of one block, whatever their number."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from logging import DEBUG
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxquant.methods.choice import MixedPrecision
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.transforms import memory
from jaxquant.transforms.calibrate import Calibration, Statistics, check_tokens, tokens, types_of_statistics
from jaxquant.transforms.memory import MemoryEstimate
from jaxquant.transforms.programs import compile_ahead, needed_memory
from jaxquant.transforms.quantize import configs_of, foreseen, plan, run_jobs
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.report import Report, joined_reports
from jaxquant.transforms.tracing.interpreter import named_leaves
from jaxquant.transforms.tracing.stages import Held, Stages

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


@dataclasses.dataclass  # which cannot be hashed: what is compiled for it goes when it goes
class _StageFunction:
    stages: Stages
    number: int

    def __call__(self, params, held):
        if self.number == len(self.stages.weights):
            return self.stages.result(params, held)
        return self.stages.run(self.number, params, held)


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
        if masks is not None and inputs is not None and len(masks) != len(inputs):
            raise ValueError(f"there are {len(masks)} masks for {len(inputs)} inputs; give one for each, or None")
        self.inputs = None if inputs is None else list(inputs)
        self._masks = None if masks is None else [None if m is None else jnp.asarray(m, bool) for m in masks]
        self._fn, self._recipe, self._behind_float = fn, recipe, predecessors == "float"
        self._steps: list[_Step] = []
        self._lookups: list = []  # rules of weights that are only looked up, where the steps are stages
        self._stages: Stages | None = None  # whose steps these are; None if a block is one step
        self._types: Statistics | None = None  # of a block, if it is not calibrated behind float ones
        self._after: Callable  # gives the next block's inputs, of what the last step has left
        self._checked: set[int] = set()  # steps whose memory was looked at: it is the same in all blocks
        self._ahead: dict[int, list[Future]] = {}  # programs of steps that are compiled beside calibration

    def prepare(self, params: Any, x: Any, real: Any = None) -> Needs:
        """What calibration takes for one block: its parameters, an input of it, and its mask."""
        self._plan(params, [x])
        if self._stages is None or self._types is None:
            estimate = self._steps[0].calibration.prepare(params, x, None if real is None else jnp.asarray(real, bool))
            return Needs(estimate, memory.types_bytes(x), estimate.parts["statistics"])
        sizes = [_statistics_bytes(self._types, weights) for weights in self._stages.weights]
        working = [peak + size for peak, size in zip(self._stages.peaks, [*sizes, 0], strict=True)]
        parts = {"statistics": max(sizes), "activations or results": max(working)}
        estimate = MemoryEstimate("calibrate", parts, "use batches of fewer or shorter sequences")
        return Needs(estimate, max(memory.types_bytes(x), *self._stages.handed_on), sum(sizes))

    def quantize(self, params: Any, *, last: bool = False, progress: Progress | None = None) -> tuple[Any, Report]:
        """Quantizes the next block.

        Args:
          params: its parameters, like those of the others in structure and shapes.
          last: no other follows; there will be no `inputs`.
          progress: called with (batches done, batches in all) in calibration.

        Returns:
          The tree and the report, as `quantize_params`.

        Raises:
          ValueError: as `calibrate` and `quantize_params`. What is in `inputs` after any error must be set anew.
        """
        if self.inputs is None:
            return self._solved(params, None, self._recipe, 0)
        if not self.inputs:
            raise ValueError("calibration needs at least one batch, but `inputs` is empty, as it is after an error")
        kinds = self._plan(params, self.inputs)
        masks = [None] * len(self.inputs) if self._masks is None else self._masks
        rows = [(real, tokens(x, real)) for x, real in zip(self.inputs, masks, strict=True)]
        held, self.inputs = self.inputs, []
        if self._stages is not None:
            held = [self._stages.begin(kind, held.pop(0)) for kind in kinds]
            self.compile_ahead(params)
        tree, reports, seen = params, [], []
        if self._lookups:
            tree, report = self._solved(tree, self._types, self._lookups, -1)
            reports.append(report)
        for i, step in enumerate(self._steps):
            stats, results = step.calibration.run(tree, self._taken(held, rows, progress, i * len(rows)))
            if self._stages is not None:
                held = [Held(kind, arrays) for kind, arrays in zip(kinds, results, strict=True)]
            elif self._behind_float:
                held = results
            seen += [(product.inputs.count, product.inputs.dropped) for product in stats.products.values()]
            memory.give_back()  # or what calibration has freed would be taken again and again
            tree, report = self._solved(tree, stats, step.recipe, i)
            reports.append(report)
            del stats
            memory.give_back()
        check_tokens(seen)
        if not last:
            for i, x in enumerate(held):
                held[i] = jax.block_until_ready(self._after(tree, x))
            self.inputs = held
        return tree, joined_reports(reports, [path for path, _ in named_leaves(params, is_qtensor)])

    def _plan(self, params: Any, inputs: Sequence[Any]) -> list[int]:
        """Finds the steps of a block, which are those of every block; and which kind each input is of, for stages."""
        if not self._steps:
            self._find_steps(params, inputs[0])
        kinds = [] if self._stages is None else [self._stages.trace(params, x) for x in inputs]
        found = [kind for kind in kinds if kind is not None]
        if len(found) < len(kinds):
            self._take_whole()
            return []
        return found

    def _find_steps(self, params: Any, x: Any) -> None:
        self._take_whole()
        if self._behind_float:
            return
        self._types = types_of_statistics(self._fn, params, x, self._recipe)
        configs = configs_of(dict(named_leaves(params, is_qtensor)), self._types, self._recipe)
        rules = {path: (re.escape(path), config) for path, config in configs.items()}
        groups = {
            path: config if isinstance(config, MixedPrecision) else path
            for path, config in configs.items()
            if path in self._types.products
        }
        stages = Stages(self._fn, groups)
        if not groups or stages.trace(params, x) is None:
            return
        self._stages, self._after = stages, quantized(_StageFunction(stages, len(stages.weights)))
        self._lookups = [rule for path, rule in rules.items() if path not in groups]
        recipes = [[rule for path, rule in rules.items() if path in weights] for weights in stages.weights]
        self._steps = [
            _Step(recipe, Calibration(quantized(_StageFunction(stages, i)), recipe, keep=lambda r: r[0], level=DEBUG))
            for i, recipe in enumerate(recipes)
        ]

    def _take_whole(self) -> None:
        """One step: all weights of a block are calibrated together."""
        keep = (lambda result: result) if self._behind_float else None
        self._steps = [_Step(self._recipe, Calibration(self._fn, self._recipe, keep=keep, level=DEBUG))]
        self._after = (lambda tree, result: result) if self._behind_float else quantized(self._fn)
        self._stages, self._lookups = None, []

    def compile_ahead(self, params: Any) -> None:
        """Begins to compile the methods' programs for a block that was given to `prepare`; `quantize` does it, too."""
        if self._stages is None or self._types is None or self._ahead or self._checked:
            return
        named = dict(named_leaves(params, is_qtensor))
        for i, step in enumerate(self._steps):
            self._ahead[i] = compile_ahead(foreseen(named, self._types, step.recipe))

    def _solved(self, params: Any, stats: Statistics | None, recipe: Any, step: int) -> tuple[Any, Report]:
        jobs = plan(dict(named_leaves(params, is_qtensor)), stats, recipe)
        if step not in self._checked:
            wait(self._ahead.pop(step, []))
            memory.ensure_fits(needed_memory(jobs), params, DEBUG)
            self._checked.add(step)
        return run_jobs(jobs, params, stats, None)

    def _taken(self, held: list, rows: list[tuple[Any, int]], progress: Progress | None, before: int) -> Iterator:
        """What a step begins with, with masks and numbers of tokens; let go on the way if results take its place."""
        total = len(rows) * len(self._steps)
        emptied = self._behind_float or self._stages is not None
        for done, (real, count) in enumerate(rows):
            if progress is not None:
                progress(before + done, total)
            yield held.pop(0) if emptied else held[done], real, count
        if progress is not None:
            progress(before + len(rows), total)


def _statistics_bytes(types: Statistics, weights: set[str]) -> int:
    """Bytes of the statistics of some weights; those that share an input share them."""
    inputs = [product.inputs for path, product in types.products.items() if path in weights]
    return sum(map(memory.types_bytes, {id(shared): shared for shared in inputs}.values()))
