"""Motions as files: arrays, animations and BVH, written and opened again."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_motions import BROKEN, DOMAIN, FRAMES, HIERARCHY, PLAIN, motion, signals

from distributed_inr.domains.motion import Motion
from distributed_inr.raw import bvh, footage


@pytest.mark.parametrize("domain", [DOMAIN, PLAIN], ids=["positions", "channels"])
@pytest.mark.parametrize("suffix", [".npz", ".npy", ".NPZ"])
def test_saved_arrays_are_opened_again(tmp_path: Path, domain: Motion, suffix: str):
    rendered = domain.truth(signals(1))[0]
    domain.save(rendered, tmp_path / f"m{suffix}")
    again = domain.open(tmp_path / f"m{suffix}")
    torch.testing.assert_close(domain.truth(again)[0], rendered, atol=1e-5, rtol=1e-5)
    assert again.key == [f"m{suffix}"]
    finer = domain.enlarge(rendered[None], 2 * FRAMES)[0]
    domain.save(finer, tmp_path / f"finer{suffix}")
    if suffix == ".npz":  # it tells its rate, so that it is brought back to the domain's
        with np.load(tmp_path / "finer.npz") as arrays:
            assert arrays["fps"] == 20 and len(arrays["positions" if domain is DOMAIN else "channels"]) == 40
            assert domain is PLAIN or arrays["parents"].tolist() == [-1, 0]
        torch.testing.assert_close(domain.truth(domain.open(tmp_path / "finer.npz"))[0], finer[::2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_animations_have_all_frames_at_the_motions_own_speed(tmp_path: Path, suffix: str):
    import av

    DOMAIN.save(DOMAIN.truth(signals(1))[0], tmp_path / f"m{suffix}")
    with av.open(str(tmp_path / f"m{suffix}")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.duration / 1e6 == pytest.approx(FRAMES / DOMAIN.fps, rel=0.06)
    assert len(frames) == FRAMES and frames[0].shape == (320, 320, 3)
    assert (frames[0] < 128).any() and not np.array_equal(frames[0], frames[10])
    with pytest.raises(ValueError, match=r"shows positions of joints, domain.content=channels; write .npz"):
        PLAIN.save(PLAIN.truth(signals(1))[0], tmp_path / f"n{suffix}")


def test_animations_last_as_long_whatever_the_frames_and_are_refused_where_they_cannot(tmp_path: Path):
    motion = DOMAIN.truth(signals(1))
    for frames in (2 * FRAMES, 3 * FRAMES):
        DOMAIN.save(DOMAIN.enlarge(motion, frames)[0], tmp_path / "m.gif")
        source = footage.scan(tmp_path / "m.gif")
        assert len(source) == frames and source.rate == pytest.approx(frames / FRAMES * DOMAIN.fps, rel=0.01)
    with pytest.raises(ValueError, match=r"60 frames a second: players slow .gif down above 50; write .mp4"):
        DOMAIN.save(DOMAIN.enlarge(motion, 6 * FRAMES)[0], tmp_path / "m.gif")


def test_bvh_channels_are_written_as_bvh_and_opened_again(tmp_path: Path):
    domain = dataclasses.replace(PLAIN, content="bvh", hierarchy=HIERARCHY, mean=(0.0,) * 6, deviation=(1.0,) * 6)
    rendered = domain.truth(signals(1, domain))[0]
    domain.save(rendered, tmp_path / "m.bvh")
    file = bvh.parse((tmp_path / "m.bvh").read_bytes())
    assert file.hierarchy == HIERARCHY and file.fps == 10
    torch.testing.assert_close(domain.truth(domain.open(tmp_path / "m.bvh"))[0], rendered, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"m.bvh: .bvh needs channels that come from BVH files"):
        DOMAIN.save(rendered, tmp_path / "m.bvh")
    with pytest.raises(ValueError, match=r"m.obj: .obj cannot be written; use .npz"):
        DOMAIN.save(rendered, tmp_path / "m.obj")
    (tmp_path / "other.bvh").write_text((tmp_path / "m.bvh").read_text().replace("OFFSET 0 1 0", "OFFSET 0 2 0"))
    with pytest.raises(ValueError, match=r"other.bvh is not a usable motion: another skeleton"):
        domain.open(tmp_path / "other.bvh")


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        (
            "short.npy",
            motion(frames=12),
            r"short.npy is not a usable motion: 12 frames at 10 a second, domain.size=20; g",
        ),
        ("wide.npy", motion(channels=9), r"wide.npy is not a usable motion: 9 channels, domain.channels=6; give"),
        ("nan.npy", BROKEN, r"nan.npy is not a usable motion: 1 of 20 frames have values that are not finite, first 3"),
        ("cube.npy", np.zeros((2, 2, 2)), r"cube.npy is not a usable motion: an array of shape \[2, 2, 2\]"),
        ("words.npy", np.array(["a"]), r"words.npy is not a usable motion: not a .npy of version 1.0 .* but <U1"),
        ("absent.npy", None, r"absent.npy is not a usable motion: cannot be read: No such file"),
        ("table.csv", "1,2", r"table.csv is not a usable motion: .csv is not one of .npz .npy .bvh"),
    ],
)
def test_ones_own_file_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, name, values, words):
    if isinstance(values, str):
        (tmp_path / name).write_text(values)
    elif values is not None:
        np.save(tmp_path / name, values)
    with pytest.raises(ValueError, match=words) as problem:
        DOMAIN.open(tmp_path / name)
    assert "\n" not in str(problem.value)


def test_ones_own_file_is_placed_and_turned_as_the_training_clips_were(tmp_path: Path):
    domain = dataclasses.replace(DOMAIN, start="turned", facing=(0.0, 0.0, 0.0, 2.0))
    walk = np.zeros((FRAMES, 2, 3))
    walk[:, 0] = [4.0, 5.0, 1.0]
    walk[:, 0, 0] += np.arange(FRAMES)
    walk[:, 1] = walk[:, 0] + [1.0, 0.0, 0.5]  # looks along x and goes there
    np.save(tmp_path / "walk.npy", walk)
    found = domain.truth(domain.open(tmp_path / "walk.npy"))[0].unflatten(1, (2, 3))
    torch.testing.assert_close(found[5, 0], torch.tensor([0.0, 5.0, 1.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(found[5, 1], torch.tensor([0.0, 6.0, 1.5]), atol=1e-4, rtol=0)
    kept = DOMAIN.truth(DOMAIN.open(tmp_path / "walk.npy"))[0]
    torch.testing.assert_close(kept, torch.from_numpy(walk.reshape(FRAMES, -1)).float(), atol=1e-4, rtol=0)
