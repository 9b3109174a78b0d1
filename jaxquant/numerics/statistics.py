"""What calibration knows of one product's input: enough for every method.

`Moments` is the running form, made of sums, maxima and a sample, so that batches, loop iterations and devices can be
merged in any order. `InputStatistics` is the finished form that methods read.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.numerics.spec import compute_dtype

HELD_OUT_EVERY = 16  # one token in this many is held out of the sums
SAMPLE_ROWS = 128  # held-out rows that are kept, those of smallest hash
STRIPS = 4  # of a wide Gram matrix that are computed apart; with more of them, products get too narrow to be fast
WIDE = 512  # channels from which on that saves time
EMPTY = np.uint32(0xFFFFFFFF)  # the rank of a row of the sample that is not filled


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gram", "abs_sum", "lowest", "highest", "count", "dropped", "rows", "rank"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over the input rows x of a product; `[*lead]` are its layer and expert axes.

    Attributes:
      gram: sum of xᵀx, float `[*lead, K, K]`; only the upper triangle counts.
      abs_sum: sum of |x|, `[*lead, K]`.
      lowest, highest: the smallest and the largest x, or 0 if that is beyond, `[*lead, K]`; held-out rows included.
      count: rows in the sums, `[*lead]`.
      dropped: rows left out because they were not finite, `[*lead]`.
      rows: a sample of held-out rows, `[*lead, SAMPLE_ROWS, K]`, zero where not filled.
      rank: their hashes, uint32 `[*lead, SAMPLE_ROWS]`, ascending; EMPTY where not filled.
    """

    gram: jax.Array
    abs_sum: jax.Array
    lowest: jax.Array
    highest: jax.Array
    count: jax.Array
    dropped: jax.Array
    rows: jax.Array
    rank: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gram", "lowest", "highest", "mean_abs", "count", "dropped", "held_out"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Statistics of the input of one product, K channels wide; leading axes stack layers or experts.

    Attributes:
      gram: mean of xᵀx over tokens, float `[*lead, K, K]` (zero where no token was seen). Its dtype is the one that
        methods compute in.
      lowest, highest: the smallest and the largest x per channel, or 0 if that is beyond, `[*lead, K]`; of held-out
        rows too, so that no static range clips a token it saw.
      mean_abs: mean |x| per channel, `[*lead, K]`.
      count: tokens in the means, `[*lead]`.
      dropped: tokens left out because an entry was not finite, `[*lead]`.
      held_out: input rows that are in none of the means, `[*lead, R, K]`, zero rows where there were fewer.
    """

    gram: jax.Array
    lowest: jax.Array
    highest: jax.Array
    mean_abs: jax.Array
    count: jax.Array
    dropped: jax.Array
    held_out: jax.Array

    @property
    def absmax(self) -> jax.Array:
        """Largest |x| per channel, `[*lead, K]`."""
        return jnp.maximum(-self.lowest, self.highest)


def token_hash(position: jax.Array) -> jax.Array:
    """A well-mixed uint32 of each token's position in the calibration stream (the finalizer of MurmurHash3)."""
    h = position.astype(jnp.uint32) ^ jnp.uint32(0x9E3779B9)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def observe(x: jax.Array, position: jax.Array, real: jax.Array | None = None) -> Moments:
    """Moments of the rows of `x`.

    Args:
      x: float `[T, K]`.
      position: integer `[T]`, each row's position in the calibration stream; decides which rows are held out.
      real: bool `[T]`, False for padding; None if every row is a token.
    """
    x = x.astype(compute_dtype(x.dtype))
    finite = jnp.all(jnp.isfinite(x), -1)
    real = jnp.ones_like(finite) if real is None else real
    rank = token_hash(position)
    held = rank % HELD_OUT_EVERY == 0
    used = finite & real & ~held
    kept = jnp.where(used[:, None], x, 0)
    count = jnp.sum(used, dtype=x.dtype)
    dropped = jnp.sum(real & ~finite, dtype=x.dtype)
    gram = _gram(kept)
    sample = finite & real & held
    rows, rank = smallest(jnp.where(sample[:, None], x, 0), jnp.where(sample, rank, EMPTY))
    lowest, highest = _extremes(x, finite & real)
    return Moments(gram, jnp.sum(jnp.abs(kept), 0), lowest, highest, count, dropped, rows, rank)


def _gram(x: jax.Array) -> jax.Array:
    """xᵀx of rows `[T, K]`. Of a wide one, strips from the diagonal on; what is left of them is zero."""
    k = x.shape[1]
    width = k if k < WIDE else -(-k // STRIPS)
    strips = [
        jnp.pad(jnp.matmul(x[:, a : a + width].T, x[:, a:], precision=lax.Precision.HIGHEST), ((0, 0), (a, 0)))
        for a in range(0, k, width)
    ]
    return jnp.concatenate(strips)


def _mirrored(gram: jax.Array) -> jax.Array:
    """Matrices `[*lead, K, K]` with the upper triangle in place of the lower one, one by one to save memory."""
    k = gram.shape[-1]
    upper = jnp.triu(jnp.ones((k, k), bool))

    def mirror(i, stack):
        return stack.at[i].set(jnp.where(upper, stack[i], stack[i].T))

    stack = gram.reshape(-1, k, k)
    return lax.fori_loop(0, len(stack), mirror, stack).reshape(gram.shape)


def observe_groups(x: jax.Array, position: jax.Array, groups: jax.Array, real: jax.Array | None = None) -> Moments:
    """Moments of the rows of each group, `[E, ...]`.

    Args:
      x: float `[T, K]`, rows in the order of their groups.
      position: integer `[T]`, as for `observe`.
      groups: integer `[E]`, rows in each group; rows beyond their sum belong to none.
      real: bool `[T]`, as for `observe`.
    """
    x = x.astype(compute_dtype(x.dtype))
    end = jnp.cumsum(groups)
    row = jnp.arange(x.shape[0])
    member = (row < end[:, None]) & (row >= (end - groups)[:, None])  # [E, T]
    finite = jnp.all(jnp.isfinite(x), -1)
    real = jnp.ones_like(finite) if real is None else real
    member &= real
    rank = token_hash(position)
    held = rank % HELD_OUT_EVERY == 0
    kept = jnp.where((finite & real & ~held)[:, None], x, 0)
    dims = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    gram = lax.ragged_dot_general(kept, kept, groups, dims, precision=lax.Precision.HIGHEST)
    share = member.astype(x.dtype)
    abs_sum = jnp.matmul(share, jnp.abs(kept), precision=lax.Precision.HIGHEST)
    lowest, highest = lax.map(partial(_extremes, x), member & finite)
    count = jnp.sum(member & finite & ~held, -1, dtype=x.dtype)
    dropped = jnp.sum(member & ~finite, -1, dtype=x.dtype)
    order = jnp.where(member & finite & held, rank, EMPTY)
    rows = jnp.where(finite[:, None], x, 0)
    rows, rank = lax.map(lambda r: smallest(jnp.where((r != EMPTY)[:, None], rows, 0), r), order)
    return Moments(gram, abs_sum, lowest, highest, count, dropped, rows, rank)


def _extremes(x: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest and largest entries `[K]` of the rows counted, and of 0."""
    x = jnp.where(counted[:, None], x, 0)
    return jnp.min(x, 0, initial=0), jnp.max(x, 0, initial=0)


def divided(stats: InputStatistics, channel_scale: jax.Array) -> InputStatistics:
    """The statistics of inputs whose channels are divided by `channel_scale` `[*lead, K]`."""
    inverse = 1 / channel_scale.astype(stats.gram.dtype)
    return dataclasses.replace(
        stats,
        gram=stats.gram * inverse[..., :, None] * inverse[..., None, :],
        lowest=stats.lowest * inverse,
        highest=stats.highest * inverse,
        mean_abs=stats.mean_abs * inverse,
        held_out=stats.held_out * inverse[..., None, :],
    )


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both."""
    rows, rank = smallest(jnp.concatenate([a.rows, b.rows], -2), jnp.concatenate([a.rank, b.rank], -1))
    return Moments(
        a.gram + b.gram,
        a.abs_sum + b.abs_sum,
        jnp.minimum(a.lowest, b.lowest),
        jnp.maximum(a.highest, b.highest),
        a.count + b.count,
        a.dropped + b.dropped,
        rows,
        rank,
    )


def empty_like(moments) -> Moments:
    """Moments of no rows, with the shapes and dtypes of `moments` (arrays or ShapeDtypeStructs)."""
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), moments)
    return dataclasses.replace(zeros, rank=jnp.full(moments.rank.shape, EMPTY))


def extremes_alone(moments: Moments) -> Moments:
    """The extremes and the mean of |x| over all channels, as those of one channel, without the Gram matrix and sample.

    A compiled program that reads nothing else computes nothing else.
    """
    lead = moments.count.shape
    nothing = empty_moments(lead, moments.gram.dtype)
    return dataclasses.replace(
        nothing,
        abs_sum=jnp.mean(moments.abs_sum, -1, keepdims=True),
        lowest=jnp.min(moments.lowest, -1, keepdims=True),
        highest=jnp.max(moments.highest, -1, keepdims=True),
        count=moments.count,
        dropped=moments.dropped,
    )


def empty_moments(lead: tuple[int, ...], dtype) -> Moments:
    """Moments `[*lead, ...]` of no rows of one channel."""
    shapes = {"gram": (1, 1), "abs_sum": (1,), "lowest": (1,), "highest": (1,), "count": (), "dropped": ()}
    zeros = {name: jnp.zeros((*lead, *shape), dtype) for name, shape in shapes.items()}
    rows, rank = jnp.zeros((*lead, SAMPLE_ROWS, 1), dtype), jnp.full((*lead, SAMPLE_ROWS), EMPTY)
    return Moments(**zeros, rows=rows, rank=rank)


def finish(moments: Moments) -> InputStatistics:
    """Divides the sums by their counts."""
    count = jnp.maximum(moments.count, 1)
    return InputStatistics(
        gram=_mirrored(moments.gram) / count[..., None, None],
        lowest=moments.lowest,
        highest=moments.highest,
        mean_abs=moments.abs_sum / count[..., None],
        count=moments.count,
        dropped=moments.dropped,
        held_out=moments.rows,
    )


def smallest(rows: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The SAMPLE_ROWS rows of smallest rank, of rows `[*lead, R, K]` with ranks `[*lead, R]`."""
    pad = max(SAMPLE_ROWS - rank.shape[-1], 0)
    rank = jnp.pad(rank, [(0, 0)] * (rank.ndim - 1) + [(0, pad)], constant_values=EMPTY)
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(0, pad), (0, 0)])
    order = jnp.argsort(rank, axis=-1)[..., :SAMPLE_ROWS]
    return jnp.take_along_axis(rows, order[..., None], -2), jnp.take_along_axis(rank, order, -1)
