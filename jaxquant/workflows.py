"""Whole jobs on checkpoints: load, calibrate, quantize, save; load and evaluate. The command line calls these."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import pretrained
from jaxquant.checkpoints.formats import FOREIGN
from jaxquant.evaluation.corpus import standard_library_text
from jaxquant.evaluation.data import read_tokens, take_samples
from jaxquant.evaluation.metrics import Comparison, compare, perplexity
from jaxquant.models.model import Model
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.pretrained import Checkpoint
from jaxquant.transforms.recipe import needs_statistics
from jaxquant.transforms.report import Report
from jaxquant.transforms.stream import quantize_blocks, stack_blocks
from jaxquant.transforms.tracing.interpreter import named_leaves

BATCH_TOKENS = 1024  # that run together in calibration
EVALUATION_SAMPLES = 64  # of the built-in text

Progress = Callable[[str, int, int], None]  # (what, done, in all)


def silent(what: str, done: int, total: int) -> None:
    """Shows no progress."""


class TextSource:
    """A checkpoint's tokenizer and the built-in text; the tokenizer is read when it is first needed."""

    def __init__(self, name: str | os.PathLike):
        self.directory = pretrained.find_model(name)
        self._tokenizer: Any = None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; ValueError where the checkpoint has none that can be read."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer  # takes seconds, and imports PyTorch where there is one

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(
                    self.directory, model_max_length=2**31, trust_remote_code=False
                )
            except Exception as error:  # tokenizers raises bare Exceptions for damaged files
                reason = str(error).strip().partition("\n")[0]
                raise ValueError(
                    f"{self.directory} has no tokenizer that can be read ({reason}); give token ids as an .npy file"
                ) from error
        return self._tokenizer

    def corpus(self, split: str, at_most: int) -> np.ndarray:
        """Tokens `[n]` of one split of the built-in text, files separated by the end-of-text token if there is one."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        tokens: list[int] = []
        files = standard_library_text(split)
        stride = max(1, len(files) // 64)  # from all over the library, not its first letters
        for text in (text for i in range(stride) for text in files[i::stride]):
            tokens += self.encode(text) + end
            if len(tokens) >= at_most:
                break
        return np.asarray(tokens[:at_most], np.int32)


def calibration_samples(model: Model, text: TextSource, file: str | None, count: int, length: int) -> np.ndarray:
    """Token samples `[count, length]` for calibration, from a file or the built-in text's training split."""
    length = min(length, model.config.max_position_embeddings)
    tokens = text.corpus("train", 8 * count * length) if file is None else read_tokens(file, text.encode)
    model.check_tokens(tokens)
    return take_samples(tokens, count, length)


def evaluation_tokens(model: Model, text: TextSource, file: str | None, context: int) -> np.ndarray:
    """Tokens to evaluate on: a whole file, or 64 contexts of the built-in text's held-out split."""
    tokens = text.corpus("held_out", EVALUATION_SAMPLES * context) if file is None else read_tokens(file, text.encode)
    model.check_tokens(tokens)
    return tokens


def batches(samples: np.ndarray, progress: Progress = silent) -> Iterator[jax.Array]:
    """Batches of calibration samples."""
    size = max(1, BATCH_TOKENS // samples.shape[1])
    for i in range(0, len(samples), size):
        progress("calibrating", i, len(samples))
        yield jnp.asarray(samples[i : i + size])
    progress("calibrating", len(samples), len(samples))


def quantize_checkpoint(
    name: str,
    out: str,
    config: Any,
    *,
    calibration: str | None = None,
    num_samples: int = 128,
    seq_len: int = 512,
    format: pretrained.Format = "jaxquant",
    overwrite: bool = False,
    progress: Progress = silent,
) -> Report:
    """Quantizes every linear layer of a checkpoint and writes the result to a directory.

    Args:
      name: checkpoint directory, "tinylm" or hub id.
      out: directory to write.
      config: a method config such as `GPTQ(int4(group_size=128))`.
      calibration: file of text or token ids; None is the built-in text. A method that needs no statistics is calibrated
        only if a file is given, for the errors in the report.
      num_samples: calibration samples.
      seq_len: tokens in each, cut to the model's context.
      format: as in `save`.
      overwrite: replaces an existing checkpoint.
      progress: called as the work goes on.

    Raises:
      ValueError, OSError: bad input; nothing is written.
    """
    if hasattr(config, "configs"):
        raise ValueError(
            f"{type(config).__name__} looks at all layers at once, and here they are quantized one after the other; "
            "use quantize_params with what load_pretrained returns"
        )
    directory = pretrained.find_model(name)
    if os.path.realpath(out) == os.path.realpath(directory):
        raise ValueError(f"{out} is the checkpoint that is read; write to another directory")
    pretrained.check_save(out, config.spec, format=format, overwrite=overwrite)
    checkpoint = pretrained.open_pretrained(directory).with_dtype("float32")
    if checkpoint.is_quantized:
        raise ValueError(f"{directory} is quantized already; quantize the float checkpoint that it was made from")
    _check_finite(checkpoint)
    samples = None
    if needs_statistics(config) or calibration is not None:
        samples = calibration_samples(checkpoint.model, TextSource(directory), calibration, num_samples, seq_len)
    rules = checkpoint.model.layer_rules(config, foldable=format in FOREIGN)
    params, report = _quantize_layers(checkpoint, samples, rules, progress)
    pretrained.save(out, checkpoint.model, params, format=format, overwrite=overwrite)
    return report


def _quantize_layers(
    checkpoint: Checkpoint, samples: np.ndarray | None, rules: list, progress: Progress
) -> tuple[Any, Report]:
    """Quantizes the linear layers, one layer of the model at a time. Returns all parameters and the report on them."""
    blocks, count = checkpoint.model.blocks, checkpoint.model.config.num_layers
    inputs, done = None, list[tuple[Any, Report]]()
    if samples is not None:
        embedding = checkpoint.outer()["embed_tokens"]["embedding"]
        inputs = [blocks.embed(embedding, batch) for batch in batches(samples)]
        del embedding

    def layers() -> Iterator[Any]:
        for i in range(count):
            yield checkpoint.layers(range(i, i + 1)) | {"windows": blocks.windows[i : i + 1]}

    def calibrating(batches: int, total: int) -> None:
        progress("calibrating", len(done) * total + batches, count * total)

    expected = {"count": count, "beside": checkpoint.outer_bytes}
    for block in quantize_blocks(blocks.apply, layers(), inputs, rules, **expected, progress=calibrating):
        done.append(block)
        progress("quantizing", len(done), count)
    stack, report = stack_blocks(done)
    params = checkpoint.outer() | {"layers": stack["layers"]}
    after = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return params, dataclasses.replace(
        report,
        unchanged=tuple(path for path, leaf in named_leaves(params, is_qtensor) if not is_qtensor(leaf)),
        bytes_before=after + report.bytes_before - report.bytes_after,
        bytes_after=after,
    )


def _check_finite(checkpoint: Checkpoint) -> None:
    """Reads everything once, before hours of work, and raises ValueError for what is not finite."""
    for name, array in checkpoint.stored():
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            where = f"{checkpoint.directory}: {name}"
            raise ValueError(f"{where}: {bad} of its {array.size} entries are not finite; repair it first")


class Evaluation(NamedTuple):
    """Perplexity of a checkpoint, and how it compares where a baseline was given."""

    tokens: int
    context: int
    perplexity: float
    comparison: Comparison | None


def evaluate_checkpoint(
    name: str, *, baseline: str | None = None, data: str | None = None, context: int = 512, progress: Progress = silent
) -> Evaluation:
    """Perplexity of a checkpoint, alone or against a baseline.

    Args:
      name: checkpoint directory, "tinylm" or hub id.
      baseline: another, with the same vocabulary.
      data: file of text or token ids; None is the built-in held-out text.
      context: tokens that the model sees at once, cut to its context length.
      progress: called as the work goes on.

    Raises:
      ValueError, OSError: bad input.
    """
    directory = pretrained.find_model(name)
    model, params = pretrained.load_pretrained(directory, dtype="float32")
    context = min(context, model.config.max_position_embeddings)
    against = None if baseline is None else pretrained.load_pretrained(pretrained.find_model(baseline), dtype="float32")
    if against is not None:
        context = min(context, against[0].config.max_position_embeddings)
    tokens = evaluation_tokens(model, TextSource(directory), data, context)

    def done(n: int, total: int) -> None:
        progress("evaluating", n, total)

    if against is None:
        alone = perplexity(model.apply, params, tokens, context=context, progress=done)
        return Evaluation(tokens.size, context, alone, None)
    other, other_params = against
    if other.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the baseline has a vocabulary of {other.config.vocab_size}, the model one of {model.config.vocab_size}; "
            "only models with the same tokenizer can be compared"
        )
    result = compare(model.apply, params, other_params, tokens, baseline_fn=other.apply, context=context, progress=done)
    return Evaluation(tokens.size, context, result.perplexity, result)
