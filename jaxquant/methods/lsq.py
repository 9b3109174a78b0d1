"""LSQ: scales that are trained with the weights, from where the papers start them.

Esser et al. 2020, "Learned Step Size Quantization" (arXiv:1902.08153), and Bhalgat et al. 2020, "LSQ+" (arXiv:
2004.09576), which adds zero points. The scale s of N numbers that share it is a parameter. It starts at 2⟨|x|⟩/√Q with
Q the largest code, where ⟨⟩ is the mean over those N; where there is a zero point, both start where they leave the
least squared error, as in LSQ+ (of the ranges that `numerics.scale_search` tries). Its gradient is multiplied by
1/√(N·Q), so that a step changes it by about as much, for its size, as it changes the weights; so is that of a zero
point. For a weight, N counts the numbers that really share a scale, those of a channel or a group, which in the papers
are those of a layer; for inputs it is the number of channels.

Three things differ. The gradient passes as far as half a step beyond the codes, not only as far as the codes, see
`numerics.affine.fake_quantize_to`. LSQ+ trains an offset β = −Z·s; here that is the zero point Z, rounded with
derivative 1, because a QTensor keeps whole numbers. And inputs with a zero point start from their extremes,
(x_max − x_min)/(Q − P), because no batch of them is kept to search in.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.numerics.affine import Qparams, choose_qparams, encode, per_code
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.scale_search import find_qparams
from jaxquant.numerics.spec import QuantSpec, check_weight_spec, compute_dtype, with_scale_dtype
from jaxquant.numerics.statistics import InputStatistics


@dataclasses.dataclass(frozen=True)
class LSQ:
    """Learned scales (and zero points) for `jq.fake_quantized`, of the weight and of a static range of its inputs.

    As a method of its own it rounds to the nearest code of the scales that training starts from.

    Attributes:
      spec: bits, symmetry and granularity.

    Raises:
      ValueError: the spec is none for weights.
    """

    spec: QuantSpec

    def __post_init__(self):
        check_weight_spec(self.spec)

    @property
    def needs_statistics(self) -> bool:
        """No."""
        return False

    def quantize(self, w: jax.Array, stats: InputStatistics | None = None) -> tuple[QTensor, dict[str, jax.Array]]:
        """Quantizes a weight, float `[in, out]`; returns the QTensor, of its dtype, and no facts."""
        del stats
        scale, zero_point = initial_qparams(w, self.spec)
        codes = encode(w, *per_code(scale, zero_point, w.shape, 1), self.spec)
        return QTensor.from_codes(codes, scale, zero_point, self.spec, dtype=w.dtype), {}


def initial_qparams(w: jax.Array, spec: QuantSpec) -> Qparams:
    """Where scales and zero points start, for a weight `[K, N]`; shapes and dtypes as `affine.choose_qparams`."""
    wide = w.astype(compute_dtype(w.dtype))
    if not spec.symmetric:
        return find_qparams(wide, with_scale_dtype(spec, w.dtype), "mse", None)
    scale, _ = choose_qparams(w, spec)
    wide = jnp.abs(wide)
    if spec.granularity == "per_tensor":
        mean = jnp.mean(wide, keepdims=True)
    else:
        mean = jnp.mean(wide.reshape(scale.shape[0], -1, w.shape[1]), 1)
    found = start(mean, spec).astype(scale.dtype)
    return jnp.where(found > 0, found, scale), None


def start(mean_abs: jax.Array, spec: QuantSpec) -> jax.Array:
    """The first scale of numbers whose mean |x| is given."""
    return 2 * mean_abs / jnp.sqrt(jnp.asarray(spec.max_code, mean_abs.dtype))


def gradient_share(count: int, spec: QuantSpec) -> float:
    """What the gradient of a scale or zero point is multiplied by, if `count` numbers share it."""
    return float((count * spec.max_code) ** -0.5)
