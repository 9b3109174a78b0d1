"""Reads tokens from files of text or token ids."""

import json
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np

Tokenize = Callable[[str], list[int]]


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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    readers = {".npy": _read_npy, ".txt": _read_txt, ".jsonl": lambda p, t: _read_jsonl(p, t, field)}
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown ending '{path.suffix}'; use .npy (token ids), .txt or .jsonl (text)")
    tokens = readers[path.suffix](path, tokenize)
    if tokens.size == 0:
        raise ValueError(f"{path} holds no tokens")
    return tokens


def _read_npy(path, tokenize) -> np.ndarray:
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


def _read_txt(path, tokenize) -> np.ndarray:
    try:
        return np.asarray(tokenize(path.read_text(encoding="utf-8")), np.int32)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None


def _read_jsonl(path, tokenize, field) -> np.ndarray:
    tokens: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):  # halves of letters
            raise ValueError(f"{path}, line {number}: expected an object with text under '{field}'")
        tokens += tokenize(text)
    return np.asarray(tokens, np.int32)


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
    if count < 1 or length < 1:
        raise ValueError(f"{count} samples of {length} tokens: both must be positive")
    if tokens.ndim == 2:
        return tokens[:count, :length]
    pieces = len(tokens) // length
    if pieces == 0:
        raise ValueError(
            f"{len(tokens)} tokens do not fill one sample of {length}; give more text, or a shorter length"
        )
    chosen = np.unique(np.linspace(0, pieces - 1, min(count, pieces)).astype(int))
    return tokens[: pieces * length].reshape(pieces, length)[chosen]
