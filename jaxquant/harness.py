"""Runs the tasks of EleutherAI's lm-eval (github.com/EleutherAI/lm-evaluation-harness) on float and quantized models.

    lm_eval.simple_evaluate(model=HarnessLM("path/to/checkpoint"), tasks=["hellaswag", "mmlu"])

Needs the extra `eval`. Prompts are tokenized, cut and scored as lm-eval's own adapter for transformers does it, so the
scores of a model are the same there and here.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from jaxquant.models.generation import Sampling, generate, rounded
from jaxquant.pretrained import load_pretrained
from jaxquant.workflows import TextSource

MAX_NEW_TOKENS = 256  # where a task does not say, as in lm-eval


class HarnessLM(TemplateLM):
    """A checkpoint as a model of lm-eval.

    Args:
      pretrained: as `load_pretrained`.
      batch_size: requests that run together.
      dtype: of the computation, as `load_pretrained`.
      max_length: tokens that the model sees at once; None is the model's context length.

    Raises:
      ValueError, OSError: as `load_pretrained`, or a size is not positive.
    """

    def __init__(self, pretrained: str, batch_size: int = 8, dtype: str | None = None, max_length: int | None = None):
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_length", 1 if max_length is None else max_length)):
            if int(value) < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        self._text = TextSource(pretrained)
        self._model, self._params = load_pretrained(self._text.directory, dtype)
        self._batch_size = int(batch_size)
        context = self._model.config.max_position_embeddings
        self.max_length = context if max_length is None else min(int(max_length), context)
        self.tokenizer = self._text.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for lm-eval's caches."""
        return str(self._text.directory).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, by the tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids, by default with the special tokens that the tokenizer adds, but never two at the start."""
        begins = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        if add_special_tokens is None and not begins:
            return self.tokenizer.encode(string)
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """The log-likelihood of each (texts, context, continuation), and whether it is the likeliest continuation."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        found: list[Any] = [None] * len(pairs)
        for batch in _by_length(pairs, lambda pair: len(pair[0]) + len(pair[1]), self._batch_size):
            for i, answer in zip(batch, self._scored([pairs[i] for i in batch]), strict=True):
                found[i] = answer
                if requests[i][0] is not None:  # a part of a rolling text has none
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return found

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        rows = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        time = min(rounded(max(map(len, rows)) - 1), self.max_length)
        tokens, targets = (np.zeros((self._batch_size, time), np.int32) for _ in range(2))
        scored = np.zeros((self._batch_size, time), bool)
        for i, (row, (_, continuation)) in enumerate(zip(rows, pairs, strict=True)):
            size = len(row) - 1
            tokens[i, :size], targets[i, :size] = row[:-1], row[1:]
            scored[i, size - len(continuation) : size] = True
        sums, likeliest = _score(self._model.apply, self._params, tokens, targets, scored)
        for i in range(len(pairs)):
            yield float(sums[i]), bool(likeliest[i])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows as long as the context in which every token counts once."""
        parts, owners = [], []
        for i, (text,) in enumerate(request.args for request in requests):
            windows = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for window in map(utils.make_disjoint_window, windows):
                parts.append((None, *window))
                owners.append(i)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [answer for answer, _ in self._loglikelihood_tokens(parts)])
        for request, total in zip(requests, sums.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of its stop sequences."""
        found: list[Any] = [None] * len(requests)
        settings = [repr(request.args[1]) for request in requests]
        for setting in dict.fromkeys(settings):
            same = [i for i, other in enumerate(settings) if other == setting]
            contexts = [self.tok_encode(requests[i].args[0]) for i in same]
            for batch in _by_length(contexts, len, self._batch_size):
                texts = self._written([contexts[j] for j in batch], requests[same[0]].args[1])
                for j, text in zip(batch, texts, strict=True):
                    found[same[j]] = text
                    self.cache_hook.add_partial("generate_until", requests[same[j]].args, text)
        return found

    def _written(self, contexts: list[list[int]], gen_kwargs: dict[str, Any]) -> list[str]:
        kwargs = normalize_gen_kwargs(gen_kwargs, MAX_NEW_TOKENS)
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(kwargs.pop("until", None), eos=end)
        most = kwargs.pop("max_gen_toks")
        room = self.max_length - most
        if room < 1:
            raise ValueError(f"max_gen_toks={most} leaves no room for a prompt in max_length={self.max_length}")
        contexts = [context[-room:] for context in contexts]
        written: list[list[int]] = [[] for _ in contexts]

        def text(tokens: Iterable[int]) -> str:
            return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

        def all_stopped(new: np.ndarray) -> bool:
            for row, token in zip(written, new, strict=False):
                if token >= 0:
                    row.append(int(token))
            return all(any(stop in text(row) for stop in stops if stop) for row in written)

        filled = contexts + contexts[-1:] * (self._batch_size - len(contexts))
        made = generate(
            self._model,
            self._params,
            filled,
            max_new_tokens=most,
            sampling=_sampling(kwargs),
            stop_tokens=[self.eot_token_id],
            on_tokens=all_stopped,
        )
        return [postprocess_generated_text(text(row), stops, None) for row in made[: len(contexts)]]


def _sampling(kwargs: dict[str, Any]) -> Sampling:
    """What the settings of a task mean; ValueError for one that would change what is drawn and is not known."""
    draws, temperature = kwargs.pop("do_sample", False), float(kwargs.pop("temperature", 0.0) or 0.0)
    temperature = temperature if draws else 0.0
    limits = {name: kwargs.pop(name, None) for name in ("top_k", "top_p")}
    if kwargs:
        raise ValueError(f"generation settings {sorted(kwargs)} are not supported; leave them out of the task")
    return Sampling(temperature, **(limits if temperature else {}))


def _by_length(items: Sequence, length: Callable[[Any], int], size: int) -> Iterator[list[int]]:
    """Indices of `items` in batches of similar length, the longest first."""
    order = sorted(range(len(items)), key=lambda i: -length(items[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@functools.partial(jax.jit, static_argnums=0)
def _score(apply, params, tokens, targets, scored):
    logs = jax.nn.log_softmax(apply(params, tokens), -1)
    chosen = jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
    right = jnp.argmax(logs, -1) == targets
    return jnp.sum(jnp.where(scored, chosen, 0), -1), jnp.all(right | ~scored, -1)
