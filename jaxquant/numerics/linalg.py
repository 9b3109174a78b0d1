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
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    eps = float(jnp.finfo(h.dtype).eps)
    h = (h / jnp.mean(jnp.diagonal(h)))[::-1, ::-1]

    def damping(retries):
        raised = max(percdamp, eps) * ESCALATION ** retries.astype(h.dtype)
        return jnp.where(retries == 0, jnp.asarray(percdamp, h.dtype), raised)

    def factored(lower):
        return jnp.min(jnp.diagonal(lower)) ** 2 > eps  # a failed factorization is all NaN, and so is the minimum

    def unfinished(state):
        lower, tries = state
        return ~factored(lower) & (tries <= MAX_RETRIES)

    def attempt(state):
        _, tries = state
        return jnp.linalg.cholesky(h + damping(tries) * eye, symmetrize_input=False), tries + 1

    lower, tries = lax.while_loop(unfinished, attempt, (jnp.zeros_like(h), jnp.int32(0)))
    ok, retries = factored(lower), tries - 1
    upper = (lower / jnp.diagonal(lower))[::-1, ::-1]
    return DampedUDU(jnp.where(ok, upper, eye), jnp.where(ok, damping(retries), jnp.inf), retries)
