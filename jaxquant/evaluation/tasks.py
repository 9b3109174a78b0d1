"""Scores of what a model writes for prompts with known answers, alone or beside another model's.

The file is JSON Lines: each line an object with `prompt` and `reference` (for the metric `instruction`: `properties`).
A list of earlier failures, each a prompt and the properties of a good answer, can so be replayed on two models.

Predictions are kept in a file as they come. A run that was interrupted goes on where it stopped, if model, settings and
examples are the same.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxquant.evaluation.data import json_lines
from jaxquant.evaluation.kept import Kept
from jaxquant.evaluation.task_metrics import METRICS, Metric, check_properties

RESAMPLES = 1000  # of the bootstrap
_REGRESSION = 1e-9

Writer = Callable[[Sequence[str]], Sequence[str]]  # prompts to what is written after each


class Example(NamedTuple):
    """A prompt and what is wanted of the text after it: a reference, or properties."""

    prompt: str
    wanted: Any


class Interval(NamedTuple):
    """A score with the central 95 % of its bootstrap distribution."""

    score: float
    low: float
    high: float


class Regression(NamedTuple):
    """An example, counted from 1, on which the model scores less than the baseline."""

    example: int
    prompt: str
    prediction: str
    baseline_prediction: str


class TaskResult(NamedTuple):
    """Scores of a model, and of a baseline on the same examples.

    Attributes:
      metric: its name.
      examples: how many.
      score: the model's.
      baseline: the baseline's; None without one.
      difference: model minus baseline, resampled in pairs; None without a baseline.
      regressions: where the model does worse; empty without a baseline, and for `bleu`, which scores no single text.
    """

    metric: str
    examples: int
    score: Interval
    baseline: Interval | None = None
    difference: Interval | None = None
    regressions: tuple[Regression, ...] = ()


def metric_named(name: str) -> Metric:
    """The metric of that name; ValueError, listing those there are, for another."""
    if name not in METRICS:
        raise ValueError(f"metric={name!r} is unknown; choose one of {', '.join(METRICS)}")
    return METRICS[name]


def read_examples(path: str | Path, metric: Metric) -> list[Example]:
    """The examples of a JSON Lines file. Blank lines are left out.

    Raises:
      ValueError: a line is no example (the message has its number), or there is none.
      FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    examples = [_example(where, record, metric) for where, record in json_lines(path)]
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def _example(where: str, record: Any, metric: Metric) -> Example:
    if not isinstance(record, dict) or not {"prompt", metric.wants} <= record.keys():
        raise ValueError(f"{where}: expected an object with 'prompt' and '{metric.wants}'")
    prompt, wanted = record["prompt"], record[metric.wants]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{where}: prompt={prompt!r} must be text that is not empty")
    if metric.wants == "reference" and not isinstance(wanted, str):
        raise ValueError(f"{where}: reference={wanted!r} must be text")
    if metric.wants == "properties":
        try:
            check_properties(wanted)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return Example(prompt, wanted)


def predictions(
    write: Writer,
    examples: Sequence[Example],
    *,
    batch_size: int = 8,
    kept: Path | None = None,
    fingerprint: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What `write` makes of the prompts.

    Args:
      write: maps prompts to texts.
      examples: the prompts.
      batch_size: prompts that `write` gets at once.
      kept: a file in which predictions are kept as they come, and from which those of an earlier run are taken.
      fingerprint: names the model and its settings, so that the predictions of another are not taken.
      progress: called with (examples done, examples in all).

    Raises:
      ValueError: `kept` is of another model, other settings or other examples, or `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more prompts")
    prompts = [example.prompt for example in examples]
    header = {"fingerprint": fingerprint, "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}
    made = Kept(kept, header, str)
    for start in range(len(made.results), len(prompts), batch_size):
        made.add(list(write(prompts[start : start + batch_size])))
        if progress is not None:
            progress(len(made.results), len(prompts))
    return made.results[: len(prompts)]


def score(name: str, examples: Sequence[Example], made: Sequence[str], baseline: Sequence[str] | None) -> TaskResult:
    """Scores predictions, and a baseline's beside them, with 95 % intervals of a (paired) bootstrap over examples.

    Args:
      name: of the metric.
      examples: what is wanted.
      made: the predictions of the model.
      baseline: those of the baseline, or None.
    """
    metric = metric_named(name)
    counts = _counts(metric, examples, made)
    if baseline is None:
        return TaskResult(name, len(examples), _interval(metric.total(counts), list(_scores(metric, counts))))
    base = _counts(metric, examples, baseline)
    scores, bases = np.array([*_scores(metric, counts)]), np.array([*_scores(metric, base)])
    mine, theirs = metric.total(counts), metric.total(base)
    return TaskResult(
        name,
        len(examples),
        _interval(mine, scores),
        _interval(theirs, bases),
        _interval(mine - theirs, scores - bases),
        tuple(_regressions(counts, base, examples, made, baseline)),
    )


def _counts(metric: Metric, examples, made) -> np.ndarray:
    return np.stack([metric.measure(text, example.wanted) for example, text in zip(examples, made, strict=True)])


def _scores(metric: Metric, counts: np.ndarray) -> Iterator[float]:
    """The scores of resampled examples, the same ones whatever the counts are."""
    rng = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        yield metric.total(counts[rng.integers(len(counts), size=len(counts))])


def _interval(value: float, resampled) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def _regressions(counts, base, examples, made, baseline) -> Iterator[Regression]:
    if counts.shape[1] > 1:
        return
    for i in np.flatnonzero(counts[:, 0] < base[:, 0] - _REGRESSION):
        yield Regression(int(i) + 1, examples[i].prompt, made[i], baseline[i])
