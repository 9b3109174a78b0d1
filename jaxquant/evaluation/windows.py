"""Cuts token streams into windows of one length, so that a model compiles once."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np


class Windows(NamedTuple):
    """Windows over token streams.

    Attributes:
      tokens: int32 `[n, context]`, zero beyond the end of a stream.
      scored: bool `[n, context - 1]`: entry t says whether the prediction of token t + 1 counts. No token of a
        stream counts twice; its first never does, nor the first of a window without overlap.
    """

    tokens: np.ndarray
    scored: np.ndarray


def cut_windows(tokens, context: int, stride: int | None = None) -> Windows:
    """Windows of `context` tokens, `stride` apart.

    Args:
      tokens: integers, one stream `[n]`, or independent streams `[streams, time]`.
      context: tokens that the model sees at once.
      stride: distance between windows, at most `context`; the overlap is context that is not scored again. None is
        `context`: no overlap, and the first token of each window is not scored.

    Raises:
      ValueError: the tokens are no integers `[n]` or `[streams, time]`, there are fewer than two in a stream, or
        `context` or `stride` is out of range.
    """
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim not in (1, 2):
        raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}; expected integers [n] or [streams, time]")
    stride = context if stride is None else stride
    if context < 2 or not 1 <= stride <= context:
        raise ValueError(f"context={context}, stride={stride}: expected context >= 2 and 1 <= stride <= context")
    streams = np.atleast_2d(tokens)
    if streams.shape[1] < 2:
        raise ValueError(
            f"tokens {list(tokens.shape)}: a stream needs at least 2 tokens, one to predict the other from"
        )
    cuts = [cut for stream in streams for cut in _cut(stream, context, stride)]
    return Windows(np.stack([t for t, _ in cuts]), np.stack([s for _, s in cuts]))


def _cut(stream: np.ndarray, context: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    scored_to = 1  # the first token of a stream has nothing to be predicted from
    for start in range(0, len(stream), stride):
        end = min(start + context, len(stream))
        window, scored = np.zeros(context, np.int32), np.zeros(context - 1, bool)
        window[: end - start] = stream[start:end]
        scored[max(scored_to - start, 1) - 1 : end - start - 1] = True
        if scored.any():
            yield window, scored
        scored_to = end
        if end == len(stream):
            return


def batches(windows: Windows, size: int) -> Iterator[Windows]:
    """Batches of `size` windows; the last is filled up with windows in which nothing is scored.

    Raises:
      ValueError: the size is not positive.
    """
    if size < 1:
        raise ValueError(f"batch_size={size} must be 1 or more windows")
    for i in range(0, len(windows.tokens), size):
        part = jax.tree.map(lambda a, i=i: a[i : i + size], windows)
        short = size - len(part.tokens)
        yield Windows(*(np.pad(a, [(0, short), (0, 0)]) for a in part))
