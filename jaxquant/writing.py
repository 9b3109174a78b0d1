"""Whole jobs with text that checkpoints write: continuing a prompt, and scores on prompts with known answers."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.checkpoints.json_file import read_json
from jaxquant.evaluation.tasks import TaskResult, metric_named, predictions, read_examples, score
from jaxquant.models.generation import FLOATS, GREEDY, Sampling, generate
from jaxquant.numerics.kv_cache import CacheSpec
from jaxquant.pretrained import load_pretrained
from jaxquant.workflows import KEPT, Progress, TextSource, silent

SETTINGS = "generation_config.json"  # Hugging Face's


@dataclasses.dataclass(frozen=True)
class Writer:
    """A checkpoint that continues texts.

    Attributes:
      text: its tokenizer, which adds the special tokens that it wants.
      max_new_tokens: at most so many for each prompt.
      sampling, cache, seed: as for `generate`.
    """

    text: TextSource
    max_new_tokens: int
    sampling: Sampling = GREEDY
    cache: CacheSpec = FLOATS
    seed: int = 0

    def write(self, prompts: Sequence[str], on_text: Callable[[str], None] | None = None) -> list[str]:
        """What the model writes after each prompt.

        Args:
          prompts: texts.
          on_text: called with pieces of the first continuation as they come.

        Raises:
          ValueError: as `generate`, or the checkpoint cannot be read.
        """
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty; a model needs a text to go on from")
        model, params = self._loaded
        tokens = [self.text.tokenizer(prompt)["input_ids"] for prompt in prompts]
        shown = None if on_text is None else _Shown(self._decode, on_text)
        made = generate(
            model,
            params,
            tokens,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop_tokens=self.stop_tokens,
            seed=self.seed,
            cache=self.cache,
            on_tokens=shown,
        )
        if shown is not None:
            shown.finish()
        return [self._decode(row) for row in made]

    def write_all(self, prompts: Sequence[str], size: int) -> list[str]:
        """As `write`, in a batch that is filled up to `size`, so that one program serves all batches."""
        more = [prompts[-1]] * (size - len(prompts))
        return self.write([*prompts, *more])[: len(prompts)]

    @property
    def fingerprint(self) -> str:
        """Names the checkpoint's files and the settings."""
        settings = [self.max_new_tokens, self.seed, str(self.sampling), str(self.cache)]
        return json.dumps([self.text.fingerprint, settings])

    @functools.cached_property
    def stop_tokens(self) -> list[int]:
        """The tokens that end a text: those of the generation settings, or else the tokenizer's."""
        path = self.text.directory / SETTINGS
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is None:
            found = self.text.tokenizer.eos_token_id
        tokens = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in tokens):
            raise ValueError(f"{path}: eos_token_id={found!r} must be a token id, or a list of them")
        return tokens

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_pretrained(self.text.directory)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.text.tokenizer.decode(tokens, skip_special_tokens=True)


class _Shown:
    """Shows a text as its tokens come; a letter of which bytes are still to come waits for them."""

    def __init__(self, decode: Callable[[Sequence[int]], str], show: Callable[[str], None]):
        self._decode, self._show = decode, show
        self._tokens: list[int] = []
        self._text = ""

    def __call__(self, new: np.ndarray) -> None:
        if new[0] >= 0:
            self._tokens.append(int(new[0]))
        text = self._decode(self._tokens)
        if not text.endswith("\ufffd"):
            self._put(text)

    def finish(self) -> None:
        """Shows what waits."""
        self._put(self._decode(self._tokens))

    def _put(self, text: str) -> None:
        self._show(text[len(self._text) :])
        self._text = text


def evaluate_task(
    name: str,
    data: str,
    metric: str,
    *,
    baseline: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    keep: str | os.PathLike = KEPT,
    progress: Progress = silent,
) -> TaskResult:
    """Scores what a checkpoint writes, greedily, for prompts with known answers, alone or beside a baseline.

    Args:
      name: checkpoint directory, "tinylm" or hub id.
      data: JSON Lines of `prompt` and `reference`; for the metric `instruction`, of `prompt` and `properties`.
      metric: a name of `evaluation.task_metrics.METRICS`.
      baseline: another checkpoint.
      max_new_tokens: at most so many for each prompt.
      batch_size: prompts that run together.
      keep: directory for predictions, which are kept as they come: a run that was interrupted goes on where it was.
      progress: called as the work goes on.

    Raises:
      ValueError, OSError: bad input.
    """
    examples = read_examples(data, metric_named(metric))

    def made(name: str, what: str) -> list[str]:
        writer = Writer(TextSource(name), max_new_tokens)
        fingerprint = writer.fingerprint
        prompts = json.dumps([example.prompt for example in examples])
        digest = hashlib.sha256((fingerprint + prompts).encode()).hexdigest()[:16]
        return predictions(
            functools.partial(writer.write_all, size=batch_size),
            examples,
            batch_size=batch_size,
            kept=Path(keep) / f"{digest}.jsonl",
            fingerprint=fingerprint,
            progress=functools.partial(progress, what),
        )

    own = made(name, "writing")
    return score(metric, examples, own, None if baseline is None else made(baseline, "writing, baseline"))
