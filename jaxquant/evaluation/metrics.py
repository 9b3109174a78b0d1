"""How well a model predicts tokens, alone and against another; for any function that gives logits.

Tokens of one window are not independent, so standard errors are taken over windows: with m_w a window's sum of some
measure and n_w its tokens, the mean is Σm_w / Σn_w and its error that of a ratio estimate (Cochran, Sampling
Techniques, 2.30). Differences are paired: both models see the same windows, and what makes a text hard for both
cancels.
"""

import functools
import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.evaluation.kept import Kept
from jaxquant.evaluation.windows import batches, cut_windows
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.transforms import meshes
from jaxquant.transforms.jobs import count_not_finite
from jaxquant.transforms.tracing.interpreter import named_leaves

LogitsFunction = Callable[[Any, jax.Array], jax.Array]  # (params, tokens [batch, time]) -> [batch, time, vocab]


class Estimate(NamedTuple):
    """A mean per token, and the standard error of it."""

    mean: float
    stderr: float


class Comparison(NamedTuple):
    """A model against a baseline, on the same tokens.

    Attributes:
      tokens: predictions that were scored.
      perplexity, baseline_perplexity: exp of the mean negative log-likelihood.
      loss_increase: mean negative log-likelihood minus the baseline's, nats per token, paired.
      kl: mean KL(baseline ‖ model) of the predicted distributions, nats per token.
      top1_agreement: share of predictions whose most likely token is the baseline's.
    """

    tokens: int
    perplexity: float
    baseline_perplexity: float
    loss_increase: Estimate
    kl: Estimate
    top1_agreement: Estimate


def perplexity(
    fn: LogitsFunction,
    params: Any,
    tokens: Any,
    *,
    context: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    kept: Path | None = None,
    fingerprint: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean negative log-likelihood of each token given those before it in its window.

    Args:
      fn: `fn(params, tokens [batch, time]) -> logits [batch, time, vocab]`.
      params: its parameters.
      tokens: integers, one stream `[n]` or independent streams `[streams, time]`.
      context: tokens per window, at most the model's context length.
      stride: distance between windows, see `cut_windows`.
      batch_size: windows that run together.
      kept: a file in which the sums of windows are kept as they come, and from which those of a run that was
        interrupted are taken.
      fingerprint: names the function and its parameters, so that the sums of others are not taken.
      progress: called with (windows done, windows in all).

    Raises:
      ValueError: as `cut_windows`, a prediction that is not finite, or `kept` is of another run.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxquant as jq
      >>> def apply(params, tokens):  # knows nothing of its 8 tokens
      ...     return jnp.zeros((*tokens.shape, 8))
      >>> round(jq.perplexity(apply, {}, np.arange(8), context=4), 4)
      8.0
    """

    def sums(window, scored):
        return (_loss_sums(fn, params, window, scored),)

    windows = cut_windows(tokens, context, stride)
    count, (loss,) = _over_windows(sums, {"params": params}, windows, batch_size, kept, fingerprint, progress)
    return _perplexity(loss, count)


def compare(
    fn: LogitsFunction,
    params: Any,
    baseline_params: Any,
    tokens: Any,
    *,
    baseline_fn: LogitsFunction | None = None,
    context: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
    kept: Path | None = None,
    fingerprint: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compares a model, such as a quantized one, with a baseline on the same tokens.

    Args:
      fn: the model's function, as in `perplexity`.
      params: its parameters.
      baseline_params: the baseline's.
      tokens: as in `perplexity`, like the arguments below.
      baseline_fn: the baseline's function; None is `fn`.
      context: tokens per window.
      stride: distance between windows.
      batch_size: windows that run together.
      kept: a file of sums.
      fingerprint: names both functions and their parameters.
      progress: called with (windows done, windows in all).

    Raises:
      ValueError: as `perplexity`.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jaxquant as jq
      >>> def apply(params, tokens):
      ...     return jnp.broadcast_to(params, (*tokens.shape, 2))
      >>> baseline, uniform = jnp.log(jnp.array([0.75, 0.25])), jnp.zeros(2)
      >>> found = jq.compare(apply, uniform, baseline, np.array([0, 1, 0, 1, 0]), context=5)
      >>> round(found.kl.mean, 4), found.top1_agreement.mean  # 0.75 log(1.5) + 0.25 log(0.5)
      (0.1308, 1.0)
    """

    def sums(window, scored):
        return _paired_sums(fn, baseline_fn or fn, params, baseline_params, window, scored)

    windows, held = cut_windows(tokens, context, stride), {"params": params, "baseline_params": baseline_params}
    count, (loss, base, kl, agree) = _over_windows(sums, held, windows, batch_size, kept, fingerprint, progress)
    return Comparison(
        tokens=int(count.sum()),
        perplexity=_perplexity(loss, count),
        baseline_perplexity=_perplexity(base, count),
        loss_increase=_estimate(loss - base, count),
        kl=_estimate(kl, count),
        top1_agreement=_estimate(agree, count),
    )


def _over_windows(sums, trees, windows, batch_size, kept, fingerprint, progress):
    """Scored tokens per window, and each measure's sum per window. `trees` are those that `sums` uses, by argument."""
    digest = hashlib.sha256(b"".join(f"{a.shape}".encode() + a.tobytes() for a in windows)).hexdigest()
    found = Kept(kept, {"fingerprint": fingerprint, "windows": digest, "batch_size": batch_size}, list)
    total, mesh = len(windows.tokens), meshes.mesh_of(trees)
    for i, batch in enumerate(batches(windows, batch_size)):
        if i == len(found.results):
            batch = batch if mesh is None else jax.tree.map(lambda a: meshes.put_batch(a, mesh), batch)
            sums_of_batch = meshes.fetched(sums(batch.tokens, batch.scored))
            found.add([[a.astype(np.float64).tolist() for a in sums_of_batch]])
        if progress is not None:
            progress(min((i + 1) * batch_size, total), total)
    measures = [np.concatenate(parts)[:total] for parts in zip(*found.results, strict=True)]
    if not all(np.isfinite(m).all() for m in measures):
        raise ValueError(f"a prediction is not finite: {_why_not_finite(trees)}")
    return windows.scored.sum(1), measures


def _why_not_finite(trees) -> str:
    for name, tree in trees.items():
        for path, leaf in named_leaves(tree, is_qtensor):
            numbers = [a for a in jax.tree.leaves(leaf) if jnp.issubdtype(a.dtype, jnp.inexact)]
            if any(map(count_not_finite, numbers)):
                return f"{name} holds NaN or infinity" + (f", in '{path}'" if path else "")
    return "a token is no vocabulary id, or the function overflows; its parameters are finite"


def _estimate(sums: np.ndarray, count: np.ndarray) -> Estimate:
    n, total = len(sums), int(count.sum())
    mean = float(sums.sum()) / total
    residual = float(np.square(sums - mean * count).sum())
    return Estimate(mean, math.sqrt(residual * n / (n - 1)) / total if n > 1 else math.nan)


def _perplexity(losses: np.ndarray, count: np.ndarray) -> float:
    loss = _estimate(losses, count).mean
    return math.inf if loss > math.log(sys.float_info.max) else math.exp(loss)


def _log_probabilities(fn, params, tokens):
    return jax.nn.log_softmax(fn(params, tokens)[:, :-1].astype(jnp.float32), -1)


def _losses(log_probabilities, tokens):
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], -1)[..., 0]


@functools.partial(jax.jit, static_argnums=0)
def _loss_sums(fn, params, tokens, scored):
    return jnp.sum(jnp.where(scored, _losses(_log_probabilities(fn, params, tokens), tokens), 0), -1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _paired_sums(fn, baseline_fn, params, baseline_params, tokens, scored):
    t = by_token(fn, baseline_fn, params, baseline_params, tokens)
    agree = (t.top == t.baseline_top).astype(jnp.float32)
    return tuple(jnp.sum(jnp.where(scored, m, 0), -1) for m in (t.loss, t.baseline_loss, t.kl, agree))


class TokenComparison(NamedTuple):
    """A model against a baseline, prediction by prediction; arrays `[batch, time - 1]`, the first of token 1.

    Attributes:
      loss, baseline_loss: negative log-likelihood of the token, nats.
      kl: KL(baseline ‖ model) of the predicted distributions, nats.
      top, baseline_top: int32, the most likely token.
    """

    loss: jax.Array
    baseline_loss: jax.Array
    kl: jax.Array
    top: jax.Array
    baseline_top: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_token(
    fn: LogitsFunction, baseline_fn: LogitsFunction, params: Any, baseline_params: Any, tokens: jax.Array
) -> TokenComparison:
    """What `compare` takes the means of, for tokens `[batch, time]`."""
    new, old = _log_probabilities(fn, params, tokens), _log_probabilities(baseline_fn, baseline_params, tokens)
    possible = old > -jnp.inf  # a vocabulary may be masked
    kl = jnp.sum(jnp.where(possible, jnp.exp(old) * (old - new), 0), -1)
    top, baseline_top = (jnp.argmax(a, -1).astype(jnp.int32) for a in (new, old))
    return TokenComparison(_losses(new, tokens), _losses(old, tokens), kl, top, baseline_top)
