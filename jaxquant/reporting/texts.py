"""What models write, and how sure they are of a text, token by token."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxquant.evaluation.metrics import by_token
from jaxquant.models.generation import generate
from jaxquant.reporting.opened import Opened
from jaxquant.workflows import TextSource

Decode = Callable[[Sequence[int]], str]


class Tokens(NamedTuple):
    """How token ids are shown, and where a text ends."""

    decode: Decode
    stop: tuple[int, ...]

    @classmethod
    def of(cls, text: TextSource) -> "Tokens":
        """Those of a checkpoint's tokenizer; without one that can be read, ids are shown as numbers."""
        try:
            tokenizer = text.tokenizer
        except ValueError:
            return cls(lambda ids: "".join(f"{i} " for i in ids), ())
        end = tokenizer.eos_token_id
        return cls(tokenizer.decode, () if end is None else (end,))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; a letter of several tokens comes with the last of them."""
        found, shown = [], ""
        for i in range(len(ids)):
            text = self.decode(ids[: i + 1])
            whole = text if i + 1 == len(ids) or not text.endswith("\ufffd") else shown
            found.append(whole[len(shown) :])
            shown = whole
        return found


class Continuation(NamedTuple):
    """What follows a prompt.

    Attributes:
      pieces: the text of each token.
      same: so many of them are the baseline's too, before the first that differs.
    """

    pieces: tuple[str, ...]
    same: int

    @property
    def diverges(self) -> bool:
        """Whether it is another text than the baseline's."""
        return self.same < len(self.pieces)


def continuations(opened: Opened, tokens: Tokens, prompts: np.ndarray, count: int) -> list[list[int]]:
    """The likeliest tokens after each prompt `[prompts, time]`, at most `count`."""
    assert opened.model is not None
    return generate(opened.model, opened.params, prompts.tolist(), max_new_tokens=count, stop_tokens=tokens.stop)


def compared(tokens: Tokens, own: Sequence[int], baseline: Sequence[int]) -> Continuation:
    """A continuation beside the baseline's."""
    pairs = zip(own, baseline, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(baseline)))
    return Continuation(tuple(tokens.pieces(own)), same)


class Token(NamedTuple):
    """One token of a passage, and how it was predicted.

    Attributes:
      piece: its text.
      kl: KL(baseline ‖ model) of its prediction, nats; None for the first, which nothing predicts.
      top, baseline_top: texts of the likeliest tokens in its place.
    """

    piece: str
    kl: float | None
    top: str = ""
    baseline_top: str = ""


def passage(opened: Opened, baseline: Opened, tokens: Tokens, ids: np.ndarray) -> tuple[Token, ...]:
    """A text `[time]` with the divergence of each prediction."""
    assert opened.model is not None
    assert baseline.model is not None
    functions: Any = opened.model.apply, baseline.model.apply
    found = by_token(*functions, opened.params, baseline.params, jnp.asarray(ids[None]))
    kl, top, old = (np.asarray(a[0]) for a in (found.kl, found.top, found.baseline_top))
    first, *rest = tokens.pieces(ids.tolist())
    likeliest = ([tokens.decode([int(t)]) for t in a] for a in (top, old))
    return Token(first, None), *map(Token, rest, map(float, kl), *likeliest)
