"""Learning from a model in float what a quantized one should say."""

import jax
import jax.numpy as jnp


def distillation_loss(
    logits: jax.Array, teacher: jax.Array, mask: jax.Array | None = None, temperature: float = 1.0
) -> jax.Array:
    """The mean Kullback-Leibler divergence KL(teacher ‖ student) over tokens, in nats, times temperature².

    Hinton et al. 2015 (arXiv:1503.02531). No gradient flows to the teacher.

    Args:
      logits: of the student, float `[..., classes]`.
      teacher: logits of the teacher, likewise.
      mask: bool `[...]`, True for tokens that count; None counts all.
      temperature: positive; both distributions are softened by it.

    Returns:
      Float `[]`, of the dtype of the logits.

    Raises:
      ValueError: the shapes differ, or the temperature is not positive.
    """
    if logits.shape != teacher.shape or (mask is not None and mask.shape != logits.shape[:-1]):
        shown = "" if mask is None else f", mask{list(mask.shape)}"
        raise ValueError(f"logits{list(logits.shape)}, teacher{list(teacher.shape)}{shown} do not fit each other")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} must be positive")
    student, teacher = (jax.nn.log_softmax(a / temperature) for a in (logits, jax.lax.stop_gradient(teacher)))
    each = jnp.sum(jnp.exp(teacher) * (teacher - student), -1) * temperature**2
    if mask is None:
        return jnp.mean(each)
    return jnp.sum(jnp.where(mask, each, 0)) / jnp.maximum(jnp.sum(mask, dtype=each.dtype), 1)
