"""What kinds of file and options there are of each domain, found out before anything is drawn or opened."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_domains import DOMAINS, autoencoder, protocol, tiny_experiment
from tiny_motions import DOMAIN as POSITIONS
from tiny_motions import HIERARCHY, PLAIN

from distributed_inr.domains import Domain, Image, Video
from distributed_inr.files import check_options, reconstruct_files, sample_files
from distributed_inr.generation import FieldModel

CLIPS = Video(size=16, frames=4)  # a third of a second
MOTIONS = DOMAINS["motion"].settle(protocol(DOMAINS["motion"]))  # positions, 16 frames at 30 a second

SCENES = DOMAINS["scene"]  # films of a quarter of a second


def model_without_prior(domain: Any, folder: Path) -> FieldModel:
    """Whoever draws of it fails."""
    experiment = dataclasses.replace(tiny_experiment(domain.kind, "ddmi", folder), domain=domain)
    built = autoencoder(domain, "ddmi").build(domain)
    return FieldModel(experiment, folder, built, None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("domain", "suffix", "resolution", "options", "words"),
    [
        (
            PLAIN,
            "bvh",
            None,
            {},
            r"^.bvh needs channels that come from BVH files \(prepared with --channels raw\); write",
        ),
        (POSITIONS, "bvh", None, {}, r"^.bvh needs channels that come from BVH files"),
        (PLAIN, "mp4", None, {}, r"^.mp4 shows positions of joints, domain.content=channels; write .npz"),
        (PLAIN, "gif", None, {}, r"^.gif shows positions of joints, domain.content=channels; write .npz"),
        (MOTIONS, "gif", 64, {}, r"^120 frames a second: players slow .gif down above 50; write .mp4, or fewer"),
        (
            MOTIONS,
            None,
            None,
            {"frames": 8},
            r"^frames=8: the .npz of a motion has only a resolution, in frames; leave",
        ),
        (CLIPS, "png", None, {"fps": 9.0}, r"^fps=9.0: the .png of a clip has frames, width; leave fps out"),
        (CLIPS, "gif", None, {"fps": 60.0}, r"^60 frames a second: players slow .gif down above 50"),
        (CLIPS, "webp", None, {"frames": 40}, r"^120 frames a second: players slow .webp down above 90"),
        (
            SCENES,
            "png",
            None,
            {"frames": 8},
            r"^frames=8: the .png of a scene has only a resolution, in px; leave frames",
        ),
        (
            SCENES,
            "glb",
            None,
            {"fps": 9.0},
            r"^fps=9.0: the .glb of a scene has only a resolution, in px; leave fps out",
        ),
        (SCENES, "glb", 1025, {}, r"^resolution=1025 must lie in 1..1024 cells a side for .glb files; lower it"),
        (SCENES, "gif", None, {"frames": 24}, r"^96 frames a second: players slow .gif down above 50"),
    ],
)
def test_what_no_file_can_be_is_refused_before_anything_is_drawn(
    domain: Domain, suffix: str | None, resolution: int | None, options: dict[str, Any], words: str, tmp_path: Path
):
    model = model_without_prior(domain, tmp_path)
    asked: dict[str, Any] = {"resolution": resolution, "suffix": suffix, "options": options}
    for write in (
        lambda: sample_files(model, tmp_path / "out", **asked),
        lambda: reconstruct_files(model, [tmp_path / "missing"], tmp_path / "out", **asked),
    ):
        with pytest.raises(ValueError, match=words) as problem:
            write()
        assert "\n" not in str(problem.value)
    assert not (tmp_path / "out").exists()


def test_options_that_a_file_has_are_those_that_were_given():
    given = {"frames": 48, "width": 1280, "fps": None}
    assert check_options(CLIPS, ".mp4", 720, given) == {"frames": 48, "width": 1280}
    assert check_options(CLIPS, ".png", 720, given) == {"frames": 48, "width": 1280}
    assert check_options(CLIPS, ".gif", 16, {"frames": 16, "fps": 50.0}) == {"frames": 16, "fps": 50.0}
    assert check_options(SCENES, ".mp4", 4096, {"frames": 24, "width": None}) == {"frames": 24}
    assert check_options(SCENES, ".ply", 1024, {}) == check_options(SCENES, ".png", 4096, {}) == {}
    assert check_options(MOTIONS, ".gif", 26, {"frames": None}) == {}
    assert check_options(MOTIONS, ".mp4", 6400, {}) == check_options(PLAIN, ".npy", 6400, {}) == {}
    raw = dataclasses.replace(PLAIN, content="bvh", hierarchy=HIERARCHY)
    assert check_options(raw, ".bvh", 64, {}) == {}
    with pytest.raises(ValueError, match="width=9000 must be above 0 and at most 8192"):
        check_options(CLIPS, ".mp4", 720, {"width": 9000})
    with pytest.raises(ValueError, match="frames=8: the .png of a picture has only a resolution, in px; leave frames"):
        check_options(Image(), ".png", 64, {"frames": 8})
