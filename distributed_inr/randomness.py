"""Random numbers that belong to samples: a vectorised counter-based generator.

Every draw is a pure function of (a sample's seed, what the draw is for, the element's index), so it does not depend on
rank, loader process, micro-batch, step or device. The generator is SplitMix64 (Steele, Lea and Flood, 2014) used as a
hash.
"""

import hashlib
import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def sample_seed(run_seed: int, position: int) -> int:
    """The seed of the sample at one position of a run, in [0, 2^63)."""
    digest = hashlib.blake2b(f"{run_seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seeds: Int64[Tensor, " batch"], purpose: str, shape: tuple[int, ...] = ()) -> Float[Tensor, "batch ..."]:
    """Independent uniform numbers in [0, 1) of `shape` for each seed, with 24 random bits each."""
    return _shift_right(_bits(seeds, purpose, math.prod(shape)), 40).to(torch.float32).mul_(2.0**-24).view(-1, *shape)


def normal(seeds: Int64[Tensor, " batch"], purpose: str, shape: tuple[int, ...]) -> Float[Tensor, "batch ..."]:
    """Independent standard normal numbers of `shape` for each seed (Box-Muller)."""
    count = math.prod(shape)
    bits = _bits(seeds, purpose, (count + 1) // 2)
    radius = (_shift_right(bits, 40).to(torch.float32).add_(0.5)).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFF).to(torch.float32).mul_(2.0 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].view(-1, *shape)


def integers(
    seeds: Int64[Tensor, " batch"], purpose: str, shape: tuple[int, ...], high: int
) -> Int64[Tensor, "batch ..."]:
    """Independent integers in [0, high) of `shape` for each seed; `high` is at most 2^31."""
    return (_shift_right(_bits(seeds, purpose, math.prod(shape)), 32) * high >> 32).view(-1, *shape)


def _bits(seeds: Tensor, purpose: str, count: int) -> Int64[Tensor, "batch count"]:
    salt = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little", signed=True)
    counters = torch.arange(1, count + 1, device=seeds.device) * _GOLDEN
    return _mix(_mix(seeds ^ salt)[:, None] + counters)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 has no unsigned counterpart with arithmetic in torch."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
