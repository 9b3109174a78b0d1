"""What a decoder computes, as one frozen value."""

import dataclasses

from jaxquant.models.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and constants of a decoder; hashable, so it can be a static argument and a cache key.

    Raises ValueError when the numbers do not fit together: `num_kv_heads` must divide `num_heads` and `head_dim` must
    be even (its halves are rotated against each other).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary embedding rotates its halves")
