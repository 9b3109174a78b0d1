"""How codes lie in memory where they have been re-laid for the kernels of a platform.

A plain QTensor holds codes `[*lead, K, *out]`: int8, or a bitstream for 4 bits and less. Prepared ones hold

    tpu    [*lead, K, *out]     int4 for 4 bits and less, int8 above
    gpu    [*lead, *out, K]     int8 for more than 4 bits
           [*lead, *out, K/2]   int8 for 4 bits and less: byte i holds code 2i in its low half and 2i + 1 in its high
                                half, which is how int4 lies on a GPU
    cpu    [*lead, *out, K]     int8 for more than 4 bits
           [*lead, *out, K/2]   int8 for 4 bits and less: of each 32 codes along K, byte i holds code i in its low
                                half, and code i + 16 in its high half

so 2 and 3 bits take as much memory as 4. The contracting axis comes last where a product reads each output's codes in
turn. On a GPU the bytes become int4 where they are used, because a scan over a stack of int4 copies each slice of it.
On a CPU, two codes that share a byte are half a run apart, so that a shift of many bytes at once gives codes in their
order; runs are short, so that groups and shards of the inputs hold whole ones.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

Platform = Literal["cpu", "gpu", "tpu"]
CHIPS = {"cpu": (), "gpu": ("h100", "h200"), "tpu": ("v4", "v5e", "v5p", "v6e", "tpu7x")}
RUN = 32  # codes along K, of which each byte holds two


@dataclasses.dataclass(frozen=True)
class Prepared:
    """For whose kernels codes have been re-laid.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      chip: its generation, such as "v5e" or "h200"; None for kernels that every one of the platform runs.
      tiles: (the most tokens, how its kernel is cut for them), ascending, where that was found by timing; the kernels
        have tables for all else.

    Raises:
      ValueError: there is no such platform or chip.
    """

    platform: Platform
    chip: str | None = None
    tiles: tuple[tuple[int, Any], ...] = ()

    def __post_init__(self):
        if self.platform not in get_args(Platform):
            raise ValueError(f"platform={self.platform!r} is not one of {', '.join(get_args(Platform))}")
        if self.chip is not None and self.chip not in CHIPS[self.platform]:
            known = ", ".join(CHIPS[self.platform]) or "none"
            raise ValueError(f"chip={self.chip!r} is no {self.platform} that is known by name ({known}); leave it out")

    @property
    def contract_last(self) -> bool:
        """Whether the contracting axis comes after the output axes."""
        return self.platform != "tpu"

    def run(self, bits: int) -> int:
        """Codes along K that lie together: what is laid out holds whole runs."""
        return 1 if bits > 4 else {"cpu": RUN, "gpu": 2, "tpu": 1}[self.platform]

    def shares_bytes(self, bits: int) -> bool:
        """Whether two codes of this width lie in a byte."""
        return self.run(bits) > 1

    def lay(self, codes: jax.Array, bits: int, axis: int) -> jax.Array:
        """Codes, int8 `[*lead, K, *out]` with K at `axis`, as they are laid out for the platform."""
        if self.contract_last:
            codes = jnp.moveaxis(codes, axis, -1)
        if self.shares_bytes(bits):
            half = self.run(bits) // 2
            runs = codes.reshape(*codes.shape[:-1], -1, 2, half)
            return (runs[..., 0, :] & 15 | runs[..., 1, :] << 4).reshape(*codes.shape[:-1], -1)
        return codes.astype(jnp.int4) if bits <= 4 else codes

    def integers(self, values: jax.Array, bits: int) -> jax.Array:
        """The codes one by one, int4 or int8, with the axes in the platform's order."""
        if not self.shares_bytes(bits):
            return values
        if self.platform == "gpu":
            pairs = lax.bitcast_convert_type(values, jnp.int4)
        else:
            pairs = jnp.concatenate(both_halves(values.reshape(*values.shape[:-1], -1, RUN // 2)), -1)
        return pairs.reshape(*values.shape[:-1], -1)

    def codes(self, values: jax.Array, bits: int, axis: int) -> jax.Array:
        """The inverse of `lay`."""
        codes = self.integers(values, bits).astype(jnp.int8)
        return jnp.moveaxis(codes, -1, axis) if self.contract_last else codes


def both_halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The signed codes in the low and in the high halves of bytes, int8 of the same shape."""
    return (values << 4) >> 4, values >> 4
