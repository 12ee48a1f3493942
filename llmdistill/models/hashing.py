"""A hash of 64-bit numbers that runs on any device."""

from __future__ import annotations

from torch import Tensor


def mix64(x: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 to int64 numbers, with wrap-around."""
    # `>>` is arithmetic on int64; each mask removes the copies of the sign bit.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
