"""GPTQ: rounds one input row after another and lets the rows to come make up for the error.

Paper: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. Original code: github.com/IST-DASLab/gptq. Names kept from there: act_order, percdamp,
block_size.

With W `[K, N]`, the inputs along axis 0, and H the damped mean of xᵀx, the paper takes H⁻¹ = CᵀC with C upper
triangular and, for each row k in order, rounds w_k to ŵ_k and subtracts C[k, j] (w_k - ŵ_k) / C[k, k] from every later
row j. Write e_k = (w_k - ŵ_k) / C[k, k] for these scaled errors and E = W - Ŵ for the errors against the original
weights: the subtractions sum up to E = Cᵀ e. Now R = C⁻¹ is upper triangular with H = R Rᵀ, so e = Rᵀ E, and row k is
rounded from

    w_k + Σ_{j<k} U[j, k] E_j,    U[j, k] = R[j, k] / R[k, k],    H = U D Uᵀ.

That is the same algorithm without an inverse (Chee et al. 2023, "QuIP", arXiv:2307.13304, theorem 6: GPTQ is LDLQ), and
it is what is computed here. A row reads the errors of earlier rows and changes no later one, at three levels: a block
adds the product with all blocks before it, a tile those of the tiles before it in its block, a row those of its tile.

Differences from the original code:
- One factorization, where that has two and an inverse.
- With act_order the groups are static: every scale comes from the original weights in the original order, and the
  codes are stored in that order. (There that is a separate option.) Without it, the scale of a group is chosen when
  its first row is reached, from the weights as compensated by all rows before it; there, only by those of earlier
  blocks. per_channel and per_tensor scales always come from the original weights, as there.
- A channel that saw no input is rounded to nearest, not set to zero, and percdamp is a fraction of the mean diagonal
  of the other channels. With no tokens at all the result is RTN's, unless `clip` has chosen other scales.
- A Gram matrix that cannot be factored is damped more, instead of failing.
- Scales that clip and a refinement of the result are options of our own.
- Groups never straddle blocks: a block is the largest multiple of the group size within block_size, or one group.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from jaxquant.numerics.affine import decode, encode
from jaxquant.numerics.batching import one_by_one_on_cpu
from jaxquant.numerics.bits import join_bits, packed, split_bits, unpacked
from jaxquant.numerics.linalg import damped_udu
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.refine import refine
from jaxquant.numerics.scale_search import Clip, check_clip, find_qparams
from jaxquant.numerics.spec import QuantSpec, check_weight_spec, with_scale_dtype
from jaxquant.numerics.statistics import InputStatistics

TILE = 32  # rows whose errors stay in a core's cache while they are rounded one by one


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Rounds with second-order error feedback.

    Attributes:
      spec: bits, symmetry and granularity of the result.
      act_order: round the channels of largest mean square input first, with static groups.
      percdamp: damping as a fraction of the mean diagonal of the Gram matrix.
      block_size: rows whose feedback is computed together; the result does not depend on it, up to rounding errors.
      clip: choose scales that clip, by the error that this names (see `numerics.scale_search`), in place of the
        extremes of the weights. It helps at 3 bits and fewer.
      refine: rounds in which scales and codes are improved afterwards (see `numerics.refine`); per_group and
        per_channel only.

    Raises:
      ValueError: a field is outside its range, or the spec is none for weights.
    """

    spec: QuantSpec
    act_order: bool = True
    percdamp: float = 0.01
    block_size: int = 128
    clip: Clip | None = None
    refine: int = 0
    needs_statistics: ClassVar[bool] = True
    any_bits: ClassVar[bool] = True

    def __post_init__(self):
        check_weight_spec(self.spec)
        check_clip(self.clip)
        if not isinstance(self.act_order, bool):
            raise ValueError(f"act_order={self.act_order!r} must be True or False")
        if type(self.refine) is not int or self.refine < 0:
            raise ValueError(f"refine={self.refine!r} must be a whole number of rounds, 0 for none")
        if self.refine and self.spec.granularity == "per_tensor":
            raise ValueError("refine works on the scales of columns; choose per_group or per_channel, or refine=0")
        if not 0 <= self.percdamp < math.inf:
            raise ValueError(f"percdamp={self.percdamp!r} must be a fraction of the mean diagonal, 0 or more; try 0.01")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size={self.block_size!r} must be a positive whole number; try 128")

    def quantize(self, w: jax.Array, stats: InputStatistics | None) -> tuple[QTensor, dict[str, jax.Array]]:
        """`gptq(w, stats, self)`."""
        return gptq(w, stats, self)


def gptq(w: jax.Array, stats: InputStatistics | None, config: GPTQ) -> tuple[QTensor, dict[str, jax.Array]]:
    """Quantizes `w`, computing in the dtype of `stats.gram`.

    Args:
      w: float `[in, out]`.
      stats: of the inputs of `w`; only `gram` is read.
      config: static.

    Returns:
      The QTensor, and these facts: `damping`, the fraction of the mean diagonal that was added in the end (infinite if
      the Gram matrix was not finite: rounded to nearest); `escalated`, whether that is more than percdamp;
      `dead_channels`, the number of inputs that were always zero.

    Raises:
      ValueError: no statistics, statistics of another width, a w of other than two axes, or a group size that does not
        divide the inputs.
      TypeError: w is not floating.
    """
    gram = _checked_gram(w, stats, config.spec)
    widest, bits = split_bits(config)
    q, info = _compiled(widest)(bits, w, gram)
    return packed(q, config), info


@functools.cache
def _compiled(config: GPTQ) -> Callable:
    return jax.jit(one_by_one_on_cpu(functools.partial(_gptq, config)))


def _gptq(config: GPTQ, bits, w: jax.Array, gram: jax.Array) -> tuple[QTensor, dict[str, jax.Array]]:
    config = join_bits(config, bits)
    k, block = w.shape[0], _block_rows(config)
    pad = (0, -k % block)  # rows of padding are channels that saw no input: nothing couples to them
    rows, gram = jnp.pad(w.astype(gram.dtype), (pad, (0, 0))), jnp.pad(gram, (pad, pad))
    spec = with_scale_dtype(config.spec, w.dtype)
    qparams = find_qparams(rows, spec, config.clip, gram)
    group = jnp.arange(rows.shape[0]) // (rows.shape[0] // qparams[0].shape[0])
    h, dead = _revive(gram)
    given = rows
    if config.act_order:
        order = jnp.argsort(-jnp.diagonal(h), stable=True)
        rows, group, h = rows[order], group[order], h[order[:, None], order]
    factor = damped_udu(h, config.percdamp)
    dynamic = config.spec.granularity == "per_group" and not config.act_order
    choose = functools.partial(_choose_group, config.clip, gram, spec) if dynamic else None
    codes, qparams = _solve(rows, factor.upper, group, qparams, spec, block, choose)
    if config.act_order:
        codes = codes[jnp.argsort(order)]
    if config.refine:
        codes, qparams = refine(given, gram, codes, qparams, spec, config.refine)
    scale, zero_point = jax.tree.map(lambda a: a[: config.spec.num_groups(k)], qparams)
    info = {
        "damping": factor.damping,
        "escalated": factor.retries > 0,
        "dead_channels": jnp.sum(dead[:k], dtype=jnp.int32),
    }
    return unpacked(QTensor.from_codes(codes[:k], scale, zero_point, config.spec, dtype=w.dtype)), info


def _checked_gram(w, stats, spec):
    if stats is None:
        raise ValueError("GPTQ needs calibration statistics, and stats is None; RTN needs none")
    if w.ndim != 2 or stats.gram.shape != (w.shape[0], w.shape[0]):
        raise ValueError(
            f"expected a weight [in, out] and statistics of `in` inputs, got w{list(w.shape)} and "
            f"stats.gram{list(stats.gram.shape)}; use jax.vmap for stacked weights"
        )
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"only floating arrays can be quantized, not {w.dtype}{list(w.shape)}")
    spec.num_groups(w.shape[0])  # raises where the groups do not divide the inputs
    return stats.gram


def _block_rows(config):
    g = config.spec.group_size or 1
    return g * max(1, config.block_size // g)


def _revive(gram):
    """`gram` with the mean of the other diagonal entries (1 if there are none) where one is zero, and where that is."""
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    live = jnp.sum(~dead, dtype=gram.dtype)
    mean = jnp.where(live > 0, jnp.sum(diagonal) / jnp.maximum(live, 1), 1)
    return gram + jnp.diag(jnp.where(dead, mean, 0)), dead


def _solve(w, upper, group, qparams, spec, block, choose):
    """Rounds all rows, `block` at a time.

    Args:
      w: weights `[K, N]`, in the order in which they are rounded, as the next two.
      upper: U `[K, K]`.
      group: `[K]`, the row of `qparams` that each row of `w` uses.
      qparams: scales and zero points `[G, N]`, or `[1, 1]` per tensor.
      spec: with the dtype of the scales filled in.
      block: a divisor of K.
      choose: replaces each group's qparams when its first row is reached; None keeps them.

    Returns:
      int8 codes `[K, N]` and the qparams.
    """

    def solve_block(b, state):
        error, codes, qparams = state
        start = b * block

        def add_earlier(i, x):
            u = _window(upper, (i * block, start), (block, block))
            return x + _feedback(u, _rows(error, i * block, block))

        w_block = _rows(w, start, block)
        x = lax.fori_loop(0, b, add_earlier, w_block)
        u = _window(upper, (start, start), (block, block))
        new_error, new_codes, qparams = _solve_block(w_block, x, u, _rows(group, start, block), qparams, spec, choose)
        return _set_rows(error, new_error, start), _set_rows(codes, new_codes, start), qparams

    state = jnp.zeros_like(w), jnp.zeros(w.shape, jnp.int8), qparams
    _, codes, qparams = lax.fori_loop(0, w.shape[0] // block, solve_block, state)
    return codes, qparams


def _solve_block(w, x, upper, group, qparams, spec, choose):
    """Rounds one block, tile by tile. `w`: its weights; `x`: the same, compensated for all earlier blocks."""
    block = w.shape[0]
    tile = math.gcd(TILE, spec.group_size if choose else block)

    def solve_tile(i, state):
        x, error, codes, qparams = state
        start = i * tile
        if choose:
            at = _rows(group, start, 1)[0]
            begins = lax.rem(start, spec.group_size) == 0
            new = functools.partial(_with_group, w, x, upper, start, at, qparams, spec, choose)
            qparams = lax.cond(begins, new, lambda: qparams)
        u = _window(upper, (start, 0), (tile, block))
        own = _window(u, (0, start), (tile, tile))
        new_error, new_codes = _solve_tile(
            _rows(w, start, tile), _rows(x, start, tile), own, _rows(group, start, tile), qparams, spec
        )
        x = x + _feedback(u, new_error)  # finished rows change too, and are not read again
        return x, _set_rows(error, new_error, start), _set_rows(codes, new_codes, start), qparams

    state = x, jnp.zeros_like(w), jnp.zeros(w.shape, jnp.int8), qparams
    return lax.fori_loop(0, block // tile, solve_tile, state)[1:]


def _choose_group(clip, gram, spec, w, at):
    """The qparams `[1, N]` of group `at`, whose weights are w."""
    size = spec.group_size
    own = _window(gram, (at * size, at * size), (size, size))
    return find_qparams(w, dataclasses.replace(spec, granularity="per_channel", group_size=None), clip, own)


def _with_group(w, x, upper, start, at, qparams, spec, choose):
    """Sets row `at` of the qparams to those of the group that begins at row `start` of a block.

    They come from the weights as the paper has them at that point: with E the errors of the rows D that are done, rows
    F to come are W_F + H_FF⁻¹ H_FD E. By H = U D Uᵀ that is W_F + U_FF⁻ᵀ U_DFᵀ E, of which the group, in front, needs
    its own part of U only. `x` is W_F + U_DFᵀ E: the same in the first row, but no further down.
    """
    size = spec.group_size
    w, x = _rows(w, start, size), _rows(x, start, size)
    u = _window(upper, (start, start), (size, size))
    w = w + solve_triangular(u, x - w, trans=1, unit_diagonal=True)
    return jax.tree.map(lambda a, b: _set_rows(a, b, at), qparams, choose(w, at))


def _solve_tile(w, x, upper, group, qparams, spec):
    """Rounds one tile, row by row. `x`: its weights, compensated for everything before it."""

    def solve_row(k, state):
        error, codes = state  # still zero from row k on
        own = _rows(group, k, 1)[0]
        scale, zero_point = jax.tree.map(lambda a: _rows(a, own, 1), qparams)
        compensated = _rows(x, k, 1) + _feedback(_window(upper, (0, k), (upper.shape[0], 1)), error)
        code = encode(compensated, scale, zero_point, spec)
        new_error = _rows(w, k, 1) - decode(code, scale, zero_point, w.dtype)
        return _set_rows(error, new_error, k), _set_rows(codes, code, k)

    return lax.fori_loop(0, w.shape[0], solve_row, (jnp.zeros_like(w), jnp.zeros(w.shape, jnp.int8)))


def _feedback(upper, error):  # what the errors of some rows add to later ones
    return jnp.matmul(upper.T, error, precision=lax.Precision.HIGHEST)


def _rows(a, start, size):
    return lax.dynamic_slice_in_dim(a, start, size, allow_negative_indices=False)


def _set_rows(a, rows, start):
    return lax.dynamic_update_slice_in_dim(a, rows, start, 0, allow_negative_indices=False)


def _window(a, start, sizes):
    return lax.dynamic_slice(a, start, sizes, allow_negative_indices=False)
