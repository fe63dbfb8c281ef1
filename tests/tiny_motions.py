"""A tiny domain of motions, and motions of it: smooth curves."""

import dataclasses

import numpy as np

from distributed_inr.domains import Signal, collate
from distributed_inr.domains.motion import Motion
from distributed_inr.randomness import sample_seed
from distributed_inr.raw.arrays import write_npy

FRAMES, CHANNELS = 20, 6
DOMAIN = Motion(
    size=FRAMES,
    channels=CHANNELS,
    content="positions",
    fps=10.0,
    mean=(0.5, -1.0, 2.0, 0.0, 3.0, -0.25),
    deviation=(0.5, 2.0, 0.1, 1.0, 0.25, 4.0),
    order=(0, 3, 1, 4, 2, 5),
    parents=(-1, 0),
    start="kept",
)
PLAIN = dataclasses.replace(DOMAIN, content="channels", parents=None)

HIERARCHY = """HIERARCHY
ROOT Hip
{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
  End Site
  {
    OFFSET 0 1 0
  }
}"""
"""Of six channels."""


def motion(number: int = 0, frames: int = FRAMES, channels: int = CHANNELS) -> np.ndarray:
    """Smooth curves, another for each channel and number."""
    time = np.linspace(0, 1, frames)[:, None]
    return np.sin(3 * time * (1 + np.arange(channels) % 3) + number + np.arange(channels)).astype(np.float32)


def motion_between(frames: int) -> np.ndarray:
    """The first of these motions at the middles of `frames` equal shares of its time."""
    place = (np.arange(frames) + 0.5) / frames * FRAMES - 0.5
    return np.stack([np.interp(place, np.arange(FRAMES), curve) for curve in motion().T], axis=1).astype(np.float32)


def signals(count: int, domain: Motion = DOMAIN) -> Signal:
    records = [{"__key__": f"{i}", "motion.npy": write_npy(motion(i)), "txt": b"a wave"} for i in range(count)]
    return collate([domain.read(record, sample_seed(0, i)) for i, record in enumerate(records)])


BROKEN = motion()
BROKEN[3, 2] = np.nan
"""A motion with one value that is none."""
