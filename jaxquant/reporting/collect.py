"""Everything that the report shows, measured."""

import dataclasses
import datetime
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.evaluation.data import take_samples
from jaxquant.evaluation.metrics import Comparison, compare, perplexity
from jaxquant.methods.rtn import RTN
from jaxquant.models.model import Model
from jaxquant.numerics.qtensor import holds_qtensors, is_qtensor
from jaxquant.numerics.spec import QuantSpec
from jaxquant.reporting import texts
from jaxquant.reporting.errors import relative_errors
from jaxquant.reporting.opened import Opened, Storage, Tally, linear, num_weights, open_checkpoint, short_name
from jaxquant.reporting.ranges import LayerRange, held_out_rows, input_ranges
from jaxquant.transforms.calibrate import Statistics, calibrate
from jaxquant.transforms.fold import unfolded
from jaxquant.transforms.memory import types_bytes
from jaxquant.workflows import Progress, TextSource, batches, evaluation_tokens, silent

SAMPLES = 8  # windows of the data that the baseline is calibrated with
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 32, 48
PASSAGE_TOKENS = 192
BASELINE = "base"  # its key in the figures


@dataclasses.dataclass(frozen=True)
class Row:
    """One checkpoint of the report.

    Attributes:
      name: as the user gave it.
      key: a short name for the figures.
      storage: of its linear layers.
      nbytes, num_weights: of all parameters, as memory holds them; None for an incomplete checkpoint.
      perplexity: on the data; None where it could not be measured.
      comparison: with the baseline.
      errors: relative squared errors of its linear layers, by their short names and layer.
      continuations: of the prompts.
      passage: a held-out text.
    """

    name: str
    key: str
    storage: Storage
    nbytes: int | None
    num_weights: int | None
    perplexity: float | None = None
    comparison: Comparison | None = None
    errors: Mapping[str, Mapping[int, float]] = dataclasses.field(default_factory=dict)
    continuations: tuple[texts.Continuation, ...] = ()
    passage: tuple[texts.Token, ...] = ()


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the report shows.

    Attributes:
      rows: the models in their order.
      baseline: that of all of them; None where none was given.
      num_layers: of the deepest.
      ranges: of the inputs of the baseline's linear layers.
      output_errors: whether errors are those of outputs, and not of weights.
      prompts: texts that the models go on from.
      notes: what is missing, and why; a line each.
      data: where the tokens are from.
      tokens, context: how many they are, and how many a model sees at once; 0 where no model ran.
      time, version, device: when, by which JAX, and on what this was measured.
    """

    rows: tuple[Row, ...]
    baseline: Row | None
    num_layers: int
    ranges: Mapping[str, tuple[LayerRange, ...]]
    output_errors: bool
    prompts: tuple[str, ...]
    notes: tuple[str, ...]
    data: str
    tokens: int
    context: int
    time: datetime.datetime
    version: str
    device: str

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The baseline, if there is one, and the models."""
        return self.rows if self.baseline is None else (self.baseline, *self.rows)


def collect(
    names: Sequence[str],
    *,
    baseline: str | None = None,
    data: str | None = None,
    context: int = 512,
    progress: Progress = silent,
) -> Findings:
    """Measures checkpoints against a baseline.

    What cannot be measured, because a checkpoint is incomplete or there is no baseline, is left out, and `notes` says
    so.

    Args:
      names: checkpoint directories, "tinylm" or hub ids; quantized or not.
      baseline: another one, with the same vocabulary, most often the float model that they were made from.
      data: file of text or token ids; None is the built-in held-out text.
      context: tokens that a model sees at once, cut to the context length of each.
      progress: called as the work goes on.

    Raises:
      ValueError, OSError: a name or the data are not to be found or read.
    """
    session = _Session(data, context, progress)
    if baseline is None:
        session.notes.append("No --baseline was given: what needs one to compare with is left out.")
    base = None if baseline is None else session.open(baseline)
    session.base = base
    rows = [session.row(session.open(name), str(i)) for i, name in enumerate(names, 1)]
    tokens = 0 if session.tokens is None else session.tokens.size
    return Findings(
        rows=tuple(rows),
        baseline=None if base is None else session.baseline_row(base, rows),
        num_layers=session.depth,
        ranges={} if session.stats is None else input_ranges(session.stats, session.depth),
        output_errors=session.output_errors,
        prompts=tuple(map(session.text_of, session.prompts)),
        notes=tuple(session.notes),
        data="the held-out part of Python's standard library" if data is None else data,
        tokens=tokens,
        context=session.context if tokens else 0,
        time=datetime.datetime.now(datetime.UTC),
        version=jax.__version__,
        device=jax.devices()[0].device_kind,
    )


class _Session:
    """What all checkpoints of a report have in common.

    The first one that runs, most often the baseline, brings the tokens and, if it is float, the statistics. Models are
    opened one after the other, and only the baseline stays in memory.
    """

    def __init__(self, data: str | None, context: int, progress: Progress):
        self._data, self._progress = data, progress
        self.context = context
        self.notes: list[str] = []
        self.depth = 0
        self.base: Opened | None = None
        self.tokens: np.ndarray | None = None
        self.stats: Statistics | None = None
        self.prompts = np.zeros((0, 1), np.int32)
        self._lead: Model | None = None
        self._lead_name = ""
        self._shown = texts.Tokens(str, ())
        self._passage = np.zeros(0, np.int32)
        self._baseline_texts: list[list[int]] | None = None

    def open(self, name: str) -> Opened:
        """Opens a checkpoint and notes what is wrong with it."""
        found = open_checkpoint(name)
        self.depth = max(self.depth, found.num_layers)
        if found.problem is not None:
            self.notes.append(f"{name} cannot be run, and has no perplexity here: {found.problem}")
        elif self._lead is None:
            self._follow(found)
        return found

    def _follow(self, lead: Opened) -> None:
        """Reads the data with a checkpoint's tokenizer, and calibrates with it."""
        assert lead.model is not None
        text, most = TextSource(lead.name), lead.model.config.max_position_embeddings
        self.context = min(self.context, most)
        tokens = evaluation_tokens(lead.model, text, self._data, self.context)
        self._lead, self._lead_name, self.tokens, self._shown = lead.model, lead.name, tokens, texts.Tokens.of(text)
        length = min(self.context, tokens.shape[-1])
        self.prompts = take_samples(tokens, PROMPTS, min(PROMPT_TOKENS, max(1, length // 2)))
        some = take_samples(tokens, PROMPTS, min(PASSAGE_TOKENS, length))
        self._passage = some[len(some) // 2]
        samples = take_samples(tokens, SAMPLES, length)
        if holds_qtensors(lead.params):
            self.notes.append(f"{lead.name} is quantized: ranges of activations need a float model as --baseline.")
            return
        recipe = lead.model.recipe(RTN(QuantSpec()))  # only which weights matters
        try:
            self.stats = calibrate(lead.model.apply, lead.params, batches(samples, self._progress), recipe=recipe)
        except ValueError as error:
            self.notes.append(f"{lead.name} could not be calibrated, and ranges of activations are left out: {error}")

    @property
    def output_errors(self) -> bool:
        """Whether the inputs of the baseline's linear layers are known."""
        return self.base is not None and self.base.params is not None and self.stats is not None

    def text_of(self, ids: np.ndarray) -> str:
        """The text of token ids."""
        return self._shown.decode(ids.tolist())

    def row(self, opened: Opened, key: str) -> Row:
        """Measures a model."""
        tally, errors = Tally(), dict[str, dict[int, float]]()
        for layer in range(opened.num_layers):
            self._progress(f"reading {opened.name}", layer + 1, opened.num_layers)
            weights = opened.layer(layer)
            tally.add(layer, linear(weights))
            for path, error in self._errors(opened, weights, layer).items():
                errors.setdefault(short_name(path), {})[layer] = error
        self._note_missing(opened, tally.storage)
        row = _row(opened, key, tally.storage, {name: errors[name] for name in opened.weights if name in errors})
        if opened.params is None:
            return row
        try:
            return dataclasses.replace(row, **self._measured(opened))
        except ValueError as error:
            self.notes.append(f"{opened.name} was not compared: {error}")
            return row

    def _errors(self, opened: Opened, weights: Mapping[str, Any], layer: int) -> dict[str, float]:
        """The errors of one layer of a model."""
        if self.base is None or self.base.model is None or not weights:
            return {}
        originals = {path: leaf for path, leaf in self.base.layer(layer).items() if not is_qtensor(leaf)}
        alike = {p: leaf for p, leaf in weights.items() if p in originals and leaf.shape == originals[p].shape}
        pairs = dataclasses.replace(self.base.model, stacked=True).fold_pairs
        own = linear(unfolded(alike, originals, pairs))
        inputs = held_out_rows(self.stats, layer) if self.output_errors and self.stats is not None else {}
        return relative_errors(own, originals, inputs)

    def _note_missing(self, opened: Opened, storage: Storage) -> None:
        if storage.missing:
            which = ", ".join(map(str, storage.missing))
            self.notes.append(f"{opened.name} lacks the linear layers of layers {which}; they are blank below.")
        if self.base is not None and 0 < opened.num_layers < self.base.num_layers:
            self.notes.append(
                f"{opened.name} has {opened.num_layers} layers, and the baseline {self.base.num_layers}; the others "
                "are blank below."
            )

    def _measured(self, opened: Opened) -> dict[str, Any]:
        """Fields of the row that need the model to run. ValueError if it does not go with the tokens."""
        model, base = opened.model, self.base
        assert model is not None
        assert self._lead is not None
        vocabulary, most = model.config.vocab_size, model.config.max_position_embeddings
        if vocabulary != self._lead.config.vocab_size:
            raise ValueError(
                f"its vocabulary of {vocabulary} is not that of {self._lead_name}, {self._lead.config.vocab_size}; "
                "only models with the same tokenizer can be compared"
            )
        if most < self.context:
            raise ValueError(f"it sees at most {most} tokens at once; give --context {most} or less")
        evaluated = functools.partial(self._progress, f"evaluating {opened.name}")
        options: Any = {"context": self.context, "progress": evaluated}
        if base is None or base.params is None or base.model is None:
            return {"perplexity": perplexity(model.apply, opened.params, self.tokens, **options)}
        result = compare(model.apply, opened.params, base.params, self.tokens, baseline_fn=base.model.apply, **options)
        own = texts.continuations(opened, self._shown, self.prompts, self._new_tokens)
        if self._baseline_texts is None:
            self._baseline_texts = texts.continuations(base, self._shown, self.prompts, self._new_tokens)
        pairs = zip(own, self._baseline_texts, strict=True)
        return {
            "perplexity": result.perplexity,
            "comparison": result,
            "continuations": tuple(texts.compared(self._shown, *pair) for pair in pairs),
            "passage": texts.passage(opened, base, self._shown, self._passage),
        }

    @property
    def _new_tokens(self) -> int:
        """As many as fit behind a prompt."""
        return min(NEW_TOKENS, self.context - self.prompts.shape[1])

    def baseline_row(self, base: Opened, rows: Sequence[Row]) -> Row:
        """The baseline, after the models that were compared with it."""
        tally = Tally()
        for layer in range(base.num_layers):
            tally.add(layer, linear(base.layer(layer)))
        self._note_missing(base, tally.storage)
        row = _row(base, BASELINE, tally.storage, {})
        known = next((r.comparison.baseline_perplexity for r in rows if r.comparison is not None), None)
        if known is None and base.params is not None and base.model is not None:
            try:
                known = perplexity(base.model.apply, base.params, self.tokens, context=self.context)
            except ValueError as error:
                self.notes.append(f"{base.name} has no perplexity: {error}")
        written = [texts.compared(self._shown, ids, ids) for ids in self._baseline_texts or []]
        return dataclasses.replace(row, perplexity=known, continuations=tuple(written))


def _row(opened: Opened, key: str, storage: Storage, errors: Mapping[str, Mapping[int, float]]) -> Row:
    whole = opened.params is not None
    sizes = (types_bytes(opened.params), num_weights(opened.params)) if whole else (None, None)
    return Row(opened.name, key, storage, sizes[0], sizes[1], errors=errors)
