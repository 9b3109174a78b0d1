"""Writes on from prompts: one pass over them, then a loop of one token after the other.

Prompts of several lengths are filled up on the left, so that all end in one place; what was filled in is never looked
at. Lengths are rounded up, so that a program serves many of them. The loop is compiled: from Python it is entered once,
or once for each token where these are wanted as they come.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.models.decoder import Past, ropes
from jaxquant.models.model import Model
from jaxquant.models.rope import LongRope
from jaxquant.numerics.kv_cache import CacheSpec

ROUNDING = 64  # lengths of prompts and caches are multiples of it


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: what logits are divided by before a token is drawn; 0 takes the likeliest.
      top_k: only the k likeliest are drawn (Fan et al. 2018, arXiv:1805.04833); None for all.
      top_p: only the likeliest that together reach this probability are drawn (nucleus sampling, Holtzman et al. 2020,
        arXiv:1904.09751); None for all.

    Raises:
      ValueError: a field is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be 0 (the likeliest token) or more; try 0.8")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k!r} must be a positive whole number of tokens, or None")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must be a probability above 0, or None")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p are for drawing; give a temperature above 0 with them")


GREEDY, FLOATS = Sampling(), CacheSpec()


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    cache: CacheSpec = FLOATS,
    on_tokens: Callable[[np.ndarray], Any] | None = None,
) -> list[list[int]]:
    """Continues prompts.

    Args:
      model: from `load_pretrained`.
      params: its parameters, quantized or not.
      prompts: token ids of each, with the special tokens that the model wants.
      max_new_tokens: at most so many for each.
      sampling: how tokens are chosen.
      stop_tokens: ids after which a continuation ends.
      seed: of the draws. A prompt at the same place of the batch gets the same draws, whatever the others are.
      cache: how keys and values are kept.
      on_tokens: called with each new token of all prompts, int32 `[prompts]`, as they come; -1 after a stop token. A
        true result ends the writing.

    Returns:
      The new tokens of each prompt, the stop token included if one came.

    Raises:
      ValueError: there is no prompt, an empty one, one that with its continuation is longer than the model's context,
        a token outside of the vocabulary, or `max_new_tokens` is not positive.
    """
    _check_prompts(model, prompts, max_new_tokens)
    longest = max(map(len, prompts))
    time = min(rounded(longest), model.config.max_position_embeddings)
    start = np.array([time - len(prompt) for prompt in prompts], np.int32)
    tokens = np.stack([np.pad(np.asarray(p, np.int32), (time - len(p), 0)) for p in prompts])
    run = _Static(model, sampling, tuple(stop_tokens), cache, rounded(time + max_new_tokens), rounded(max_new_tokens))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
    nothing = jnp.full((len(prompts), run.room), -1, jnp.int32), jnp.int32(0), jnp.zeros(len(prompts), bool)
    state = _read(run, params, tokens, start, _State(None, *nothing, keys))
    turns = _turns(model, prompts)

    def go_on(state: _State, until: int) -> _State:
        for turn in turns:
            if state.written <= turn < until:
                state = _go_on(run, params, state, jnp.int32(turn))
                text = np.maximum(np.asarray(state.out)[:, :turn], 0)
                state = _read(run, params, np.concatenate([tokens, text], 1), start, state)
        return _go_on(run, params, state, jnp.int32(until))

    if on_tokens is None:
        state = go_on(state, max_new_tokens)
    else:
        while not on_tokens(np.asarray(state.out[:, state.written - 1])):
            if state.written == max_new_tokens or state.done.all():
                break
            state = go_on(state, int(state.written) + 1)
    return [[int(token) for token in row if token >= 0] for row in np.asarray(state.out)]


def _check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be a positive whole number")
    if not len(prompts):
        raise ValueError("prompts is empty; give at least one")
    context = model.config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; a model needs a token to go on from")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, with max_new_tokens={max_new_tokens} more than the model's "
                f"context of {context}; shorten either"
            )
        model.check_tokens(prompt)


def _turns(model: Model, prompts: Sequence[Sequence[int]]) -> list[int]:
    """After how many new tokens a sequence outgrows the rotation of its keys (LongRoPE), and is read again, whole."""
    scalings = [rope.scaling for rope in ropes(model.config) if isinstance(rope.scaling, LongRope)]
    turns = {scaling.original_max_position_embeddings + 1 - len(prompt) for scaling in scalings for prompt in prompts}
    return sorted(turn for turn in turns if turn > 0)


def rounded(length: int) -> int:
    """The multiple of `ROUNDING` from a length up."""
    return -(-length // ROUNDING) * ROUNDING


class _Static(NamedTuple):
    """What a compiled loop depends on."""

    model: Model
    sampling: Sampling
    stop_tokens: tuple[int, ...]
    cache: CacheSpec
    capacity: int
    room: int


class _State(NamedTuple):
    """The loop's: `out` int32 `[batch, room]` is -1 where nothing was written; `written` columns of it were."""

    past: Past | None
    out: jax.Array
    written: jax.Array
    done: jax.Array
    keys: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _read(run: _Static, params, tokens, start, state: _State) -> _State:
    """The state after one more token, behind texts that are read from their beginnings."""
    logits, past = run.model.decode(params, tokens, run.model.empty_past(run.cache, start, run.capacity))
    return _written(run, logits, state._replace(past=past))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _go_on(run: _Static, params, state: _State, until) -> _State:
    """The state after `until` tokens, or once all prompts are done."""

    def step(state: _State) -> _State:
        assert state.past is not None
        last = lax.dynamic_slice_in_dim(state.out, state.written - 1, 1, 1)
        logits, past = run.model.decode(params, jnp.maximum(last, 0), state.past)  # done ones go on with anything
        return _written(run, logits, state._replace(past=past))

    return lax.while_loop(lambda state: (state.written < until) & ~state.done.all(), step, state)


def _written(run: _Static, logits: jax.Array, state: _State) -> _State:
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.written)
    chosen = jnp.where(state.done, -1, choose(logits, keys, run.sampling))
    done = state.done | jnp.isin(chosen, jnp.array(run.stop_tokens, jnp.int32))
    out = lax.dynamic_update_slice_in_dim(state.out, chosen[:, None], state.written, 1)
    return state._replace(out=out, written=state.written + 1, done=done)


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each sequence, int32 `[batch]`, from `logits` `[batch, vocab]` and a key for each."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        least = lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        chances = jax.nn.softmax(ordered, -1)
        needed = jnp.cumsum(chances, -1) - chances < sampling.top_p  # what comes before does not reach it
        least = jnp.min(jnp.where(needed, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
