"""Dense little-endian bitstreams of 2- to 8-bit codes.

Code i of a stream occupies bits [i·bits, (i+1)·bits). Eight codes fill exactly `bits` bytes, so a stream is cut into
blocks of eight codes, and a last, partial block is filled up with zeros. GPTQ's and compressed-tensors' 32-bit words
are the same stream read four bytes at a time.
"""

import jax
import jax.numpy as jnp

BLOCK = 8  # codes per block of `bits` bytes


def packed_size(size: int, bits: int) -> int:
    """Bytes that `size` codes take."""
    return -(-size // BLOCK) * bits


def pack_bits(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """Packs unsigned codes densely along one axis.

    Args:
      codes: integers in [0, 2^bits), any shape; higher bits are dropped.
      bits: width of a code, 2 to 8.
      axis: the axis to pack.

    Returns:
      uint8, with `packed_size(n, bits)` bytes along `axis` in place of n codes.
    """
    u = jnp.moveaxis(codes.astype(jnp.uint8) & jnp.uint8(2**bits - 1), axis, -1)
    u = jnp.pad(u, [(0, 0)] * (u.ndim - 1) + [(0, -u.shape[-1] % BLOCK)])
    u = u.reshape(*u.shape[:-1], -1, BLOCK)
    out = [jnp.zeros(u.shape[:-1], jnp.uint8) for _ in range(bits)]
    for i in range(BLOCK):
        byte, shift = divmod(i * bits, 8)
        out[byte] |= u[..., i] << shift
        if shift + bits > 8:  # the code runs over into the next byte
            out[byte + 1] |= u[..., i] >> (8 - shift)
    stream = jnp.stack(out, -1)
    return jnp.moveaxis(stream.reshape(*stream.shape[:-2], -1), -1, axis)


def unpack_bits(stream: jax.Array, bits: int, size: int, axis: int) -> jax.Array:
    """The inverse of `pack_bits`: `size` unsigned codes (uint8) along `axis`.

    Raises:
      ValueError: the stream does not have the bytes that `size` codes take.
    """
    if stream.shape[axis] != packed_size(size, bits):
        raise ValueError(
            f"{size} codes of {bits} bits take {packed_size(size, bits)} bytes, but axis {axis} of the stream "
            f"{stream.shape} holds {stream.shape[axis]}"
        )
    s = jnp.moveaxis(stream, axis, -1)
    s = s.reshape(*s.shape[:-1], -1, bits)
    codes = []
    for i in range(BLOCK):
        byte, shift = divmod(i * bits, 8)
        code = s[..., byte] >> shift
        if shift + bits > 8:
            code |= s[..., byte + 1] << (8 - shift)
        codes.append(code & jnp.uint8(2**bits - 1))
    u = jnp.stack(codes, -1)
    return jnp.moveaxis(u.reshape(*u.shape[:-2], -1)[..., :size], -1, axis)
