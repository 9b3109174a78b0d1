"""Reads tokens from files of text or token ids, and makes samples of one length of them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

Tokenize = Callable[[str], list[int]]
ENDINGS = (".npy", ".txt", ".jsonl")


class Samples(NamedTuple):
    """Sequences of one length to calibrate with.

    Attributes:
      tokens: int32 `[samples, length]`, 0 where they are not real.
      real: bool `[samples, length]`, which are tokens of the data and no padding; None if all are.
    """

    tokens: np.ndarray
    real: np.ndarray | None

    def batches(self, size: int) -> list["Samples"]:
        """The samples, `size` at a time; the last may be fewer."""
        pieces = (slice(i, i + size) for i in range(0, len(self.tokens), size))
        return [Samples(self.tokens[at], None if self.real is None else self.real[at]) for at in pieces]

    @property
    def num_tokens(self) -> int:
        """How many tokens are real."""
        return self.tokens.size if self.real is None else int(np.count_nonzero(self.real))

    @property
    def sha256(self) -> str:
        """A checksum of the tokens, and of which of them are real."""
        digest = hashlib.sha256(f"{self.tokens.shape} {self.real is None}".encode())
        digest.update(self.tokens.astype("<i4").tobytes())
        digest.update(b"" if self.real is None else self.real.astype(bool).tobytes())
        return digest.hexdigest()


def read_tokens(path: str | Path, tokenize: Tokenize, *, field: str = "text") -> np.ndarray:
    """Tokens of a file.

    Args:
      path: `.npy` of token ids, `[n]` or `[samples, time]`; `.txt` of UTF-8 text; or `.jsonl`, one JSON object a line.
      tokenize: turns text into token ids.
      field: the key of the text in each line of a `.jsonl` file.

    Returns:
      int32 `[n]` or `[samples, time]`; the texts of a `.jsonl` file are joined to one stream.

    Raises:
      ValueError: another ending, an empty file, or contents that are not what the ending says.
      FileNotFoundError: no such file.
    """
    path = Path(path)
    tokens = _read_npy(path) if _ending(path) == ".npy" else np.concatenate(read_documents(path, tokenize, field=field))
    if tokens.size == 0:
        raise ValueError(f"{path} holds no tokens")
    return tokens


def read_documents(path: str | Path, tokenize: Tokenize, *, field: str = "text") -> list[np.ndarray]:
    """Tokens `[n]` of each document of a file. Arguments and errors as `read_tokens`.

    A document is a line of a `.jsonl` file, a row of an `.npy` file or the text of a `.txt` file.
    """
    path = Path(path)
    if _ending(path) == ".npy":
        return list(np.atleast_2d(_read_npy(path)))
    texts = _read_txt(path) if path.suffix == ".txt" else _read_jsonl(path, field)
    documents = [np.asarray(tokenize(text), np.int32) for text in texts]
    if not any(map(len, documents)):
        raise ValueError(f"{path} holds no tokens")
    return documents


def _ending(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path}: unknown ending '{path.suffix}'; use .npy (token ids), .txt or .jsonl (text)")
    return path.suffix


def _read_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            tokens = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OverflowError, MemoryError, BadZipFile, TokenError) as error:
        raise ValueError(f"{path} is no readable .npy file of integers: {error}") from None
    if not isinstance(tokens, np.ndarray) or tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        what = f"{tokens.dtype}{list(tokens.shape)}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise ValueError(f"{path} holds {what}; expected integer token ids, [n] or [samples, time]")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**31:
        raise ValueError(f"{path} holds token ids from {tokens.min()} to {tokens.max()}; expected 0 to 2147483647")
    return tokens.astype(np.int32)


def _read_txt(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """What each line of a file holds, and where that is, for messages. Blank lines are left out.

    Raises:
      ValueError: a line is no JSON; the message has its number.
    """
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON ({error})") from None


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for where, record in json_lines(path):
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):  # halves of letters
            raise ValueError(f"{where}: expected an object with text under '{field}'")
        yield text


def take_samples(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """At most `count` samples of `length` tokens.

    Args:
      tokens: one stream `[n]`, cut into pieces of which evenly spaced ones are taken; or samples `[samples, time]`, of
        which the first are taken and cut to `length`.
      count: samples wanted.
      length: tokens in each.

    Raises:
      ValueError: `count` or `length` is not positive, or the tokens do not fill one sample.
    """
    _check_sizes(count, length)
    if tokens.ndim == 2:
        return tokens[:count, :length]
    pieces = len(tokens) // length
    if pieces == 0:
        raise ValueError(
            f"{len(tokens)} tokens do not fill one sample of {length}; give more text, or a shorter length"
        )
    chosen = np.unique(np.linspace(0, pieces - 1, min(count, pieces)).astype(int))
    return tokens[: pieces * length].reshape(pieces, length)[chosen]


def pad_documents(documents: Sequence[np.ndarray], count: int, length: int, seed: int) -> Samples:
    """At most `count` documents, each from its beginning, as samples of one length.

    Args:
      documents: tokens `[n]` of each; empty ones are passed over.
      count: documents wanted; if there are more, the seed decides which are taken.
      length: tokens of a sample: longer documents are cut, shorter ones are followed by padding.
      seed: of the choice.

    Raises:
      ValueError: `count` or `length` is not positive, or there is no token.
    """
    _check_sizes(count, length)
    documents = [document for document in documents if len(document)]
    if not documents:
        raise ValueError("the documents hold no tokens")
    if len(documents) > count:
        chosen = np.random.default_rng(seed).choice(len(documents), count, replace=False)
        documents = [documents[i] for i in sorted(chosen)]
    tokens = np.zeros((len(documents), length), np.int32)
    real = np.zeros(tokens.shape, bool)
    for i, document in enumerate(documents):
        tokens[i, : len(document)] = document[:length]
        real[i, : len(document)] = True
    return Samples(tokens, None if real.all() else real)


def read_until(texts: Iterable[str], tokenize: Tokenize, *, tokens: int = 0, documents: int = 0) -> list[np.ndarray]:
    """Tokens of the first texts: of all, until there are so many tokens and so many documents."""
    found: list[np.ndarray] = []
    total = 0
    for text in texts:
        found.append(np.asarray(tokenize(text), np.int32))
        total += len(found[-1])
        if total >= tokens and len(found) >= documents:
            break
    return found


def _check_sizes(count: int, length: int) -> None:
    if count < 1 or length < 1:
        raise ValueError(f"{count} samples of {length} tokens: both must be positive")
