"""The factorization of a Gram matrix that second-order rounding needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ESCALATION = 10.0  # each retry multiplies the damping by this
MAX_RETRIES = 12  # even from no damping at all this ends far above the largest eigenvalue


class DampedUDU(NamedTuple):
    """`h + damping · mean(diag(h)) · I = U D Uᵀ` with a diagonal D, which is not kept.

    Attributes:
      upper: U, upper triangular with a unit diagonal, `[K, K]`.
      damping: the fraction of the mean diagonal that was added; infinite where h could not be factored at all, and
        `upper` is then the identity.
      retries: int32, how often the damping was raised.
    """

    upper: jax.Array
    damping: jax.Array
    retries: jax.Array


def damped_udu(h: jax.Array, percdamp: float) -> DampedUDU:
    """Factors a damped Gram matrix into U D Uᵀ.

    It is the ordinary Cholesky factorization of `h` with rows and columns in reverse order. A matrix counts as factored
    if no pivot is lost in the rounding errors of a mean diagonal entry. Otherwise (percdamp = 0 and a singular matrix,
    a Gram matrix that rounding made indefinite) it is tried again with ten times the damping.

    Args:
      h: float `[K, K]`, symmetric, positive semidefinite up to rounding, with a positive diagonal.
      percdamp: damping as a fraction of the mean diagonal.
    """
    on_diagonal = jnp.eye(h.shape[0], dtype=bool)
    mean, eps = jnp.mean(jnp.diagonal(h)), float(jnp.finfo(h.dtype).eps)

    def damping(retries):
        raised = max(percdamp, eps) * ESCALATION ** retries.astype(h.dtype)
        return jnp.where(retries == 0, jnp.asarray(percdamp, h.dtype), raised)

    def factored(lower):
        return jnp.min(jnp.diagonal(lower)) ** 2 > eps * mean  # a failed factorization is NaN, and so is its minimum

    def unfinished(state):
        lower, tries = state
        return ~factored(lower) & (tries <= MAX_RETRIES)

    def attempt(state):
        _, tries = state
        damped = jnp.where(on_diagonal, jnp.diagonal(h) + damping(tries) * mean, h)
        return jnp.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False), tries + 1

    lower, tries = lax.while_loop(unfinished, attempt, (jnp.zeros_like(h), jnp.int32(0)))
    ok, retries = factored(lower), tries - 1
    upper = (lower / jnp.diagonal(lower))[::-1, ::-1]
    upper = jnp.where(ok, upper, on_diagonal.astype(h.dtype))
    return DampedUDU(upper, jnp.where(ok, damping(retries), jnp.inf), retries)
