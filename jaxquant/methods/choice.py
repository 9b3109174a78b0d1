"""Configs that leave the method, or the bits, open: `quantize_params` tries all of them and keeps what errs least.

They say what to choose from; the choice is made in `transforms.choose`, because it looks at several weights at once.
"""

import dataclasses
import math
from typing import Any

from jaxquant.numerics.spec import QuantSpec


@dataclasses.dataclass(frozen=True, init=False)
class Best:
    """For each weight the method with the smallest output error on held-out calibration tokens.

    A stack of layers is one weight. Where a method scales channels, weights that share their inputs get the same one.

    Attributes:
      configs: method configs whose specs differ in nothing; at equal errors the first one wins.

    Raises:
      ValueError: fewer than two configs, or specs that differ.
    """

    configs: tuple[Any, ...]

    def __init__(self, configs):
        object.__setattr__(self, "configs", _checked("Best", configs))
        specs = {config.spec for config in self.configs}
        if len(specs) > 1:
            raise ValueError(
                f"Best chooses among methods of one spec, not {sorted(map(str, specs))}; see MixedPrecision"
            )

    @property
    def spec(self) -> QuantSpec:
        """That of all configs."""
        return self.configs[0].spec

    @property
    def needs_statistics(self) -> bool:
        """True: errors are measured."""
        return True

    def quantize(self, w, stats):
        """Raises TypeError: the choice is that of `quantize_params`."""
        raise TypeError("Best is carried out by quantize_params, and quantizes no single matrix")


@dataclasses.dataclass(frozen=True, init=False)
class MixedPrecision:
    """For each weight one of several configs, so that output errors are smallest for a number of bits.

    Minimized is the sum of the relative output errors of all matrices on held-out calibration tokens, exactly, under
    the condition that the weights that have this config take at most `budget_bits` bits per weight, scales included. A
    stack of layers is one weight.

    Attributes:
      budget_bits: bits per weight on average.
      configs: method configs to choose from.

    Raises:
      ValueError: fewer than two configs, or a budget that is not positive.
    """

    budget_bits: float
    configs: tuple[Any, ...]

    def __init__(self, budget_bits, configs):
        if not 0 < budget_bits < math.inf:
            raise ValueError(f"budget_bits={budget_bits!r} must be a positive number of bits per weight")
        object.__setattr__(self, "budget_bits", budget_bits)
        object.__setattr__(self, "configs", _checked("MixedPrecision", configs))

    @property
    def spec(self) -> QuantSpec:
        """That of the config with the most bits."""
        return max((config.spec for config in self.configs), key=lambda spec: spec.bits)

    @property
    def needs_statistics(self) -> bool:
        """True: errors are measured."""
        return True

    def quantize(self, w, stats):
        """Raises TypeError: the choice is that of `quantize_params`."""
        raise TypeError("MixedPrecision is carried out by quantize_params, and quantizes no single matrix")


def _checked(name: str, configs) -> tuple[Any, ...]:
    configs = tuple(configs)
    if len(configs) < 2:
        raise ValueError(f"{name} chooses among two configs or more, not {configs}")
    for config in configs:
        if not hasattr(config, "quantize") or hasattr(config, "configs"):
            raise ValueError(f"{name} cannot choose {config!r}; give method configs such as GPTQ(int4())")
    return configs
