"""Chain: methods one after the other. Those before the last scale channels, the last one rounds.

With D = diag(d) of all scales together, the last method sees W′ = D W and the inputs x D⁻¹, whose Gram matrix is
D⁻¹ H D⁻¹. So `Chain(SmoothQuant(0.5), GPTQ(int8()))` is GPTQ of smoothed weights, and `Chain(AWQ(spec), GPTQ(spec))` is
GPTQ with AWQ's scales.
"""

import jax
import jax.numpy as jnp

from jaxquant.numerics.channel_scale import Facts, scale_and_quantize
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec, compute_dtype
from jaxquant.numerics.statistics import InputStatistics, divided


class Chain:
    """Composes methods.

    Args:
      *steps: method configs; all but the last must scale channels (`SmoothQuant`, `AWQ`), the last one says what comes
        out.

    Raises:
      ValueError: fewer than two steps, a step before the last that scales no channels, or a last one that does.
    """

    needs_statistics = True

    def __init__(self, *steps):
        if len(steps) < 2:
            raise ValueError("a Chain has two steps or more; write for example Chain(SmoothQuant(0.5), GPTQ(int8()))")
        *first, last = steps
        for step in first:
            if not hasattr(step, "channel_scale") or isinstance(step, Chain):
                raise ValueError(f"{step!r} scales no channels, so nothing can follow it; put it last")
        if not hasattr(last, "quantize") or hasattr(last, "channel_scale") or hasattr(last, "for_inputs"):
            raise ValueError(f"{last!r} cannot be the last step of a Chain; take RTN or GPTQ")
        self.steps = steps

    @property
    def spec(self) -> QuantSpec:
        """That of the last step."""
        return self.steps[-1].spec

    def channel_scale(self, w: jax.Array, stats: InputStatistics) -> tuple[jax.Array, Facts]:
        """The product of all steps' scales; see `numerics.channel_scale.ScalesChannels`."""
        dtype, facts = stats.gram.dtype, Facts()
        total = jnp.ones(len(w), dtype)
        for step in self.steps[:-1]:
            scaled = (w.astype(compute_dtype(dtype)) * total[:, None]).astype(w.dtype)
            scale, more = step.channel_scale(scaled, divided(stats, total))
            total, facts = total * scale, facts | more
        return total, facts

    def quantize_scaled(self, w: jax.Array, stats: InputStatistics) -> tuple[QTensor, Facts]:
        """What the last step makes of a scaled weight."""
        return self.steps[-1].quantize(w, stats)

    def quantize(self, w: jax.Array, stats: InputStatistics | None) -> tuple[QTensor, Facts]:
        """Quantizes `w` `[in, out]`; returns the QTensor and all steps' facts. Raises ValueError without statistics."""
        return scale_and_quantize(self, w, stats, str(self))

    def __repr__(self):
        return f"Chain({', '.join(map(repr, self.steps))})"

    def __eq__(self, other):
        return isinstance(other, Chain) and self.steps == other.steps

    def __hash__(self):
        return hash(self.steps)
