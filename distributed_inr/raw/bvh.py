"""BVH files: a hierarchy of joints, and for each frame the channels that move them."""

import math
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

MAX_JOINTS = 1000
MAX_NUMBERS = 2**25
"""Of the MOTION section: an hour and a half of 100 channels at 60 frames a second, a quarter of a GiB once parsed."""

_MAX_HIERARCHY_BYTES = 2**20
_HEADER = re.compile(rb"\s*Frames:\s*(\d{1,9})\s+Frame\s+Time:\s*([0-9.eE+-]{1,30})\s")
_WORD = re.compile(rb"\S+")
_ROTATIONS = {"Xrotation": 0, "Yrotation": 1, "Zrotation": 2}
_POSITIONS = {"Xposition": 0, "Yposition": 1, "Zposition": 2}


@dataclass(frozen=True)
class Joint:
    """A joint, or the end of a chain, which has no channels."""

    name: str
    parent: int
    offset: tuple[float, float, float]
    channels: tuple[str, ...]


@dataclass(frozen=True)
class File:
    """What a BVH file holds.

    Attributes:
        hierarchy: that section of the file as it stands there.
        joints: in the file's order, the root first, parents before their children.
        values: of each frame the channels of all joints in turn.
    """

    hierarchy: str
    joints: tuple[Joint, ...]
    values: Float[np.ndarray, "frames channels"]
    fps: float


def parse(content: bytes) -> File:
    """Read a file. Raises ValueError with the first thing that is wrong.

    Words are taken one by one, and counted before any is kept: split at once, they would be ten times the file.
    """
    end = content.find(b"MOTION")
    if end < 0:
        raise ValueError("no MOTION section: not a BVH file, or cut off")
    if end > _MAX_HIERARCHY_BYTES:
        raise ValueError(
            f"the HIERARCHY section has {end} bytes, above the limit of {_MAX_HIERARCHY_BYTES}; shorten it"
        )
    hierarchy = content[:end].decode("utf-8", errors="replace")
    joints = parse_hierarchy(hierarchy)
    header = _HEADER.match(content, end + len(b"MOTION"))
    if header is None:
        raise ValueError("the MOTION section does not begin with Frames and Frame Time")
    count, width = int(header[1]), sum(len(joint.channels) for joint in joints)
    seconds = _number(header[2].decode())
    if not seconds > 0:
        raise ValueError(f"Frame Time is {seconds}; it must be above 0")
    if count * width > MAX_NUMBERS:
        raise ValueError(
            f"{count} frames of {width} channels, above the limit of {MAX_NUMBERS} numbers; cut the recording"
        )
    found = sum(1 for _ in _WORD.finditer(content, header.end()))
    if found != count * width:
        raise ValueError(f"{found} numbers in the MOTION section, expected {count} frames of {width} channels")
    try:
        numbers = (float(word[0]) for word in _WORD.finditer(content, header.end()))
        values = np.fromiter(numbers, np.float64, count=found).reshape(count, width)
    except ValueError as error:
        raise ValueError(f"the MOTION section holds what is not a number: {str(error)[:80]}") from None
    return File(hierarchy.strip(), joints, values, round(1 / seconds, 3))


def parse_hierarchy(text: str) -> tuple[Joint, ...]:
    """The joints of a HIERARCHY section. Raises ValueError where it cannot be read."""
    words = iter(text.split())
    joints: list[Joint] = []
    chain: list[int] = []  # of the open braces
    opening = False

    def following() -> str:
        word = next(words, None)
        if word is None:
            raise ValueError("the HIERARCHY section is cut off")
        return word

    for word in words:
        if word in ("ROOT", "JOINT", "End"):
            if (word == "ROOT") != (not joints):
                raise ValueError("the HIERARCHY section must have one ROOT, first")
            if len(joints) == MAX_JOINTS or (joints and not chain):
                raise ValueError(f"joint {len(joints)} is outside the root's braces, or above the limit {MAX_JOINTS}")
            name, parent = following(), chain[-1] if chain else -1
            name = f"{joints[parent].name}_end" if word == "End" else name
            joints.append(Joint(name, parent, (0.0, 0.0, 0.0), ()))
            opening = True
        elif word == "{":
            if not opening:
                raise ValueError("the HIERARCHY section has a brace that belongs to no joint")
            chain.append(len(joints) - 1)
            opening = False
        elif word == "}" and chain:
            chain.pop()
        elif word == "OFFSET" and chain:
            x, y, z = (_number(following()) for _ in range(3))
            joints[chain[-1]] = _changed(joints[chain[-1]], offset=(x, y, z))
        elif word == "CHANNELS" and chain:
            count = following()
            names = tuple(following() for _ in range(int(count))) if re.fullmatch("[0-9]", count) else ()
            if len(names) != len(set(names)) or set(names) - {*_ROTATIONS, *_POSITIONS} or not names:
                raise ValueError(f"channels {count} {' '.join(names)} of {joints[chain[-1]].name} are not known")
            joints[chain[-1]] = _changed(joints[chain[-1]], channels=names)
        elif word != "HIERARCHY":
            raise ValueError(f"{word[:40]!r} is not expected in the HIERARCHY section")
    if chain or not joints or not any(joint.channels for joint in joints):
        raise ValueError("the HIERARCHY section is cut off, or has no joint with channels")
    return tuple(joints)


def num_channels(hierarchy: str) -> int:
    """Numbers of each frame, by the HIERARCHY section. Raises ValueError where it cannot be read."""
    return sum(len(joint.channels) for joint in parse_hierarchy(hierarchy))


def positions(file: File) -> Float[np.ndarray, "frames joints 3"]:
    """Places of all joints and ends of chains, by forward kinematics.

    A joint's rotations apply in the order of its channels, the first outermost. Position channels stand in place of the
    offset, as the usual readers take them.
    """
    frames, column = len(file.values), 0
    places = np.zeros((frames, len(file.joints), 3))
    turns = np.empty((frames, len(file.joints), 3, 3))
    for number, joint in enumerate(file.joints):
        local = np.tile(np.array(joint.offset), (frames, 1))
        turn = np.tile(np.eye(3), (frames, 1, 1))
        for name in joint.channels:
            values = file.values[:, column]
            column += 1
            if name in _POSITIONS:
                local[:, _POSITIONS[name]] = values
            else:
                turn = turn @ _rotation(np.radians(values), _ROTATIONS[name])
        if joint.parent < 0:
            places[:, number], turns[:, number] = local, turn
            continue
        outer = turns[:, joint.parent]
        places[:, number] = places[:, joint.parent] + (outer @ local[..., None])[..., 0]
        turns[:, number] = outer @ turn
    return places


def without_jumps(file: File) -> Float[np.ndarray, "frames channels"]:
    """The channels, with angles that go on beyond half a turn where the file's jump: the same pose, a smooth curve."""
    names = [name for joint in file.joints for name in joint.channels]
    angles = [column for column, name in enumerate(names) if name in _ROTATIONS]
    values = file.values.copy()
    values[:, angles] = np.unwrap(values[:, angles], period=360, axis=0)
    return values


def write(hierarchy: str, values: Float[np.ndarray, "frames channels"], fps: float) -> str:
    """A file's text. Raises ValueError where the channels are not those of the hierarchy."""
    width = num_channels(hierarchy)
    if values.shape[1] != width:
        raise ValueError(f"{values.shape[1]} channels for a BVH hierarchy of {width}; give as many")
    lines = [" ".join(f"{value:.6f}" for value in row) for row in values.tolist()]
    return "\n".join([hierarchy, "MOTION", f"Frames: {len(lines)}", f"Frame Time: {1 / fps:.8f}", *lines, ""])


def _rotation(angle: Float[np.ndarray, " frames"], axis: int) -> Float[np.ndarray, "frames 3 3"]:
    """Rotations about one axis, counter-clockwise as seen against it."""
    found = np.tile(np.eye(3), (len(angle), 1, 1))
    first, second = (axis + 1) % 3, (axis + 2) % 3
    found[:, first, first] = found[:, second, second] = np.cos(angle)
    found[:, second, first] = np.sin(angle)
    found[:, first, second] = -found[:, second, first]
    return found


def _number(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{word[:40]!r} stands where a number should")
    return value


def _changed(joint: Joint, **parts: object) -> Joint:
    return Joint(**{**vars(joint), **parts})  # type: ignore[arg-type]
