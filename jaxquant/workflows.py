"""Whole jobs on checkpoints: load, calibrate, quantize, save; load and evaluate. The command line calls these."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxquant import pretrained
from jaxquant.checkpoints.formats import FOREIGN
from jaxquant.evaluation import hub_data
from jaxquant.evaluation.corpus import standard_library_text
from jaxquant.evaluation.data import (
    ENDINGS,
    Samples,
    pad_documents,
    read_documents,
    read_tokens,
    read_until,
    take_samples,
)
from jaxquant.evaluation.metrics import Comparison, compare, perplexity
from jaxquant.models.model import Model
from jaxquant.opening import find_model, open_pretrained
from jaxquant.parts import FORMATS
from jaxquant.streaming import LayerByLayer, Progress
from jaxquant.transforms.meshes import placed
from jaxquant.transforms.recipe import needs_statistics
from jaxquant.transforms.report import Report
from jaxquant.transforms.stream import Predecessors

BATCH_TOKENS = 1024  # that run together in calibration
EVALUATION_SAMPLES = 64  # of the built-in text
KEPT = "jaxquant-kept"  # where evaluations keep what they have


def silent(what: str, done: int, total: int) -> None:
    """Shows no progress."""


class TextSource:
    """A checkpoint's tokenizer and the built-in text; the tokenizer is read when it is first needed."""

    def __init__(self, name: str | os.PathLike):
        self.directory = find_model(name)
        self._tokenizer: Any = None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def fingerprint(self) -> str:
        """Names the checkpoint's files as they are now."""
        files = sorted(path for path in self.directory.iterdir() if path.suffix in (".json", ".safetensors"))
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return json.dumps([os.path.realpath(self.directory), stats])

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


def calibration_samples(
    model: Model,
    text: TextSource,
    source: str | None,
    count: int,
    length: int,
    *,
    field: str = "text",
    pad: bool = False,
    seed: int = 0,
) -> Samples:
    """Samples for calibration.

    Args:
      model: whose vocabulary and context they must fit.
      text: its tokenizer, and the built-in text.
      source: a file of text or token ids, a data set of the Hugging Face hub ("owner/name" or "owner/name:config"), or
        None for the built-in text's training split.
      count: samples, at most.
      length: tokens in each, cut to the model's context.
      field: what the text is called in a `.jsonl` file or a data set.
      pad: one document for each sample, cut or padded, in place of one stream that is cut into pieces.
      seed: decides which documents are taken where there are more.

    Raises:
      ValueError, OSError: as `read_tokens` and `hub_data.texts`, or a token is outside of the vocabulary.
    """
    length = min(length, model.config.max_position_embeddings)
    wanted = {"documents": count} if pad else {"tokens": count * length}
    if source is None:
        documents = [text.corpus("train", 8 * count * length)]
    elif not Path(source).exists() and Path(source).suffix not in ENDINGS and hub_data.is_name(source):
        documents = read_until(hub_data.texts(source, field=field, seed=seed), text.encode, **wanted)
    elif pad:
        documents = read_documents(source, text.encode, field=field)
    else:
        documents = [read_tokens(source, text.encode, field=field)]
    if pad:
        samples = pad_documents(documents, count, length, seed)
    else:
        samples = Samples(take_samples(np.concatenate(documents), count, length), None)
    model.check_tokens(samples.tokens)
    return samples


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
    field: str = "text",
    pad: bool = False,
    seed: int = 0,
    format: pretrained.Format = "jaxquant",
    predecessors: Predecessors = "quantized",
    overwrite: bool = False,
    resume: bool = True,
    mesh: Mesh | None = None,
    progress: Progress = silent,
) -> Report:
    """Quantizes every linear layer of a checkpoint and writes the result to a directory.

    Args:
      name: checkpoint directory, "tinylm" or hub id.
      out: directory to write.
      config: a method config such as `GPTQ(int4(group_size=128))`.
      calibration: file of text or token ids, or a data set of the Hugging Face hub; None is the built-in text. A method
        that needs no statistics is calibrated only if this is given, for the errors in the report.
      num_samples, seq_len, field, pad, seed: as `count`, `length` and so on for `calibration_samples`.
      format: as in `save`, but for "orbax", which is not written layer by layer.
      predecessors: what a weight is calibrated behind: those before it, in its layer too, as they are "quantized", or
        "float".
      overwrite: replaces an existing checkpoint.
      resume: continues a run with the same arguments that was not finished, and gives what it would have given. Without
        it, what such a run has done is removed.
      mesh: devices of this process that work together, with axes "data" (samples) and "model" (output channels).
      progress: called as the work goes on.

    Raises:
      ValueError, OSError: bad input, or an unfinished run with other arguments. Nothing is written under `out`.
    """
    if hasattr(config, "configs"):
        raise ValueError(
            f"{type(config).__name__} looks at all layers at once, and here they are quantized one after the other; "
            "use quantize_params with what load_pretrained returns"
        )
    if jax.process_count() > 1:
        raise ValueError("checkpoints are quantized by one process; in several, use calibrate and quantize_params")
    directory = find_model(name)
    if os.path.realpath(out) == os.path.realpath(directory):
        raise ValueError(f"{out} is the checkpoint that is read; write to another directory")
    if format not in FORMATS:
        raise ValueError(
            f"format={format!r} is not written layer by layer; choose {', '.join(FORMATS)}, then load_pretrained "
            "and save what it returns"
        )
    pretrained.check_save(out, config.spec, format=format, overwrite=overwrite)
    checkpoint = open_pretrained(directory).with_dtype("float32")
    if checkpoint.is_quantized:
        raise ValueError(f"{directory} is quantized already; quantize the float checkpoint that it was made from")
    model, samples, how = checkpoint.model, None, dict[str, Any]()
    rules = model.layer_rules(config, foldable=format in FOREIGN)
    if needs_statistics(config) or calibration is not None:
        how = {"field": field, "pad": pad, "seed": seed}
        samples = calibration_samples(model, TextSource(directory), calibration, num_samples, seq_len, **how)
    work = LayerByLayer(checkpoint, rules, samples, BATCH_TOKENS, format, predecessors, mesh)
    report = work.run(out, overwrite=overwrite, resume=resume, progress=progress)
    if samples is None:
        return report
    shape = dict(zip(("sequences", "length"), samples.tokens.shape, strict=True))
    data = {"source": calibration or "built-in", **shape, "tokens": samples.num_tokens, **how, "sha256": samples.sha256}
    return dataclasses.replace(report, calibration=data)


class Evaluation(NamedTuple):
    """Perplexity of a checkpoint, and how it compares where a baseline was given."""

    tokens: int
    context: int
    perplexity: float
    comparison: Comparison | None


def evaluate_checkpoint(
    name: str,
    *,
    baseline: str | None = None,
    data: str | None = None,
    context: int = 512,
    mesh: Mesh | None = None,
    keep: str | os.PathLike = KEPT,
    progress: Progress = silent,
) -> Evaluation:
    """Perplexity of a checkpoint, alone or against a baseline.

    Args:
      name: checkpoint directory, "tinylm" or hub id.
      baseline: another, with the same vocabulary.
      data: file of text or token ids; None is the built-in held-out text.
      context: tokens that the model sees at once, cut to its context length.
      mesh: as for `quantize_checkpoint`.
      keep: directory for what has been found so far, until all of it has: a run that was interrupted goes on there.
      progress: called as the work goes on.

    Raises:
      ValueError, OSError: bad input.
    """
    text, other_text = TextSource(name), None if baseline is None else TextSource(baseline)
    model, params = pretrained.load_pretrained(text.directory, dtype="float32")
    other, other_params = model, None
    if other_text is not None:
        other, other_params = pretrained.load_pretrained(other_text.directory, dtype="float32")
    if other.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the baseline has a vocabulary of {other.config.vocab_size}, the model one of {model.config.vocab_size}; "
            "only models with the same tokenizer can be compared"
        )
    context = min(context, model.config.max_position_embeddings, other.config.max_position_embeddings)
    tokens = evaluation_tokens(model, text, data, context)

    def done(n: int, total: int) -> None:
        progress("evaluating", n, total)

    params = placed(params, mesh)
    with _kept(keep, [t.fingerprint for t in (text, other_text) if t is not None], tokens, context) as kept:
        how = {"context": context, "progress": done, **kept}
        if other_params is None:
            return Evaluation(tokens.size, context, perplexity(model.apply, params, tokens, **how), None)
        other_params = placed(other_params, mesh)
        result = compare(model.apply, params, other_params, tokens, baseline_fn=other.apply, **how)
        return Evaluation(tokens.size, context, result.perplexity, result)


@contextlib.contextmanager
def _kept(keep: str | os.PathLike, names: list[str], tokens: np.ndarray, context: int) -> Iterator[dict[str, Any]]:
    """Arguments of `perplexity` and `compare` that make them keep what they have, until they have finished."""
    directory, fingerprint = Path(keep), json.dumps([*names, context, hashlib.sha256(tokens.tobytes()).hexdigest()])
    file = directory / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.jsonl"
    yield {"kept": file, "fingerprint": fingerprint}
    file.unlink()
    with contextlib.suppress(OSError):  # others keep something there
        directory.rmdir()
