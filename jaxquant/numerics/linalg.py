"""The factor of a damped inverse that second-order rounding needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

ESCALATION = 10.0  # each retry multiplies the damping by this
MAX_RETRIES = 12  # from 1% of the mean diagonal this ends far above the largest eigenvalue


class InverseFactor(NamedTuple):
    """Upper triangular `u` `[K, K]` with `inv(h + damping·I) = uᵀu`, and the damping that made `h` factor."""

    u: jax.Array
    damping: jax.Array


def damped_inverse_cholesky(h: jax.Array, percdamp: float) -> InverseFactor:
    """Factors the inverse of a damped Gram matrix.

    `h = R Rᵀ` with R upper triangular is the ordinary Cholesky factorization of `h` with rows and columns in reverse
    order, and then `u = R⁻¹`: one factorization and one triangular inverse, where GPTQ's original code takes two
    factorizations and a full inverse.

    Args:
      h: float `[K, K]`, symmetric, positive semidefinite up to rounding, with a positive diagonal.
      percdamp: damping as a fraction of the mean diagonal. Where the factorization fails (rounding, or percdamp = 0 and
        a singular matrix), it is retried with ten times the damping.
    """
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    mean = jnp.mean(jnp.diagonal(h))
    floor = jnp.finfo(h.dtype).eps * mean  # what an escalation from zero starts at

    def factor(damping):
        return jnp.linalg.cholesky((h + damping * eye)[::-1, ::-1], symmetrize_input=False)

    def failed(state):
        lower, _, tries = state
        return ~jnp.all(jnp.isfinite(jnp.diagonal(lower))) & (tries < MAX_RETRIES)

    def retry(state):
        _, damping, tries = state
        damping = jnp.maximum(damping * ESCALATION, floor)
        return factor(damping), damping, tries + 1

    damping = jnp.asarray(percdamp, h.dtype) * mean
    lower, damping, _ = lax.while_loop(failed, retry, (factor(damping), damping, jnp.int32(0)))
    inverse = solve_triangular(lower, eye, lower=True)
    return InverseFactor(inverse[::-1, ::-1], damping)
