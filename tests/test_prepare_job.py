"""The bundled sets, and jobs/prepare_data.py from the shell."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny_sets import by_key, png, save_picture, write_set

from distributed_inr.data.prepare import Plan, prepare_set, verify
from distributed_inr.data.shards import load_index
from distributed_inr.domains.domain import caption, captions
from distributed_inr.raw import pictures

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["furniture", "furniture-all", "furniture-text"])
def test_bundled_sets_are_whole_and_their_objects_on_one_side(name: str) -> None:
    sides = {}
    for part in ("train", "val"):
        url = str(ROOT / "examples" / "data" / name / part)
        assert verify(url) == []
        index = load_index(url)
        assert all(shard.bytes <= 12_000_000 for shard in index.shards)
        sides[part] = by_key(index)
    objects = [{key.split("/")[0] for key in sides[part]} for part in ("train", "val")]
    assert not objects[0] & objects[1]
    if name == "furniture":
        assert (len(sides["train"]), len(sides["val"])) == (816, 72)
        assert len({json.loads(r["json"])["class"] for r in sides["val"].values()}) == 3
    else:
        assert len(sides["train"]) + len(sides["val"]) == {"furniture-all": 4200, "furniture-text": 1344}[name]
        texts = [{r["txt"].lower().split(b"\n")[0] for r in side.values()} for side in sides.values()]
        assert not texts[0] & texts[1]
    sample = next(iter(sides["val"].values()))
    assert pictures.decode(sample["webp"]).size == (128, 128)


def test_bundled_captions_are_several_a_sample_of_names_on_one_side() -> None:
    for name, count, longest in (("furniture-text", 7344, 34), ("furniture-shape", 2090, 37)):
        sides = [by_key(load_index(f"bundled:{name}/{part}")) for part in ("train", "val")]
        texts = [[captions(caption(record)) for record in side.values()] for side in sides]
        every = [line for side in texts for own in side for line in own]
        assert len(every) == count and max(map(len, every)) == longest and all(line == line.lower() for line in every)
        assert not {own[0] for own in texts[0]} & {own[0] for own in texts[1]}
        classes = {json.loads(record["json"]).get("class") for record in sides[1].values()} - {None}
        assert len(classes) >= 3
        assert all(verify(f"bundled:{name}/{part}") == [] for part in ("train", "val"))


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "prepare_data.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@pytest.mark.slow
def test_the_job_prepares_verifies_and_describes(tmp_path: Path) -> None:
    for i in range(10):
        save_picture(tmp_path / "raw" / "chair" / f"{i}.png", i, size=40)
    out = str(tmp_path / "out")
    made = job("image", str(tmp_path / "raw"), "--out", out, "--size", "32", "--val-fraction", "0.3")
    assert made.returncode == 0 and "train:" in made.stdout and made.stdout.strip().endswith(out), made.stderr
    assert job("verify", f"{out}/train").returncode == 0
    assert json.loads(job("describe", f"{out}/train").stdout)["protocol"]["form"]["size"] == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["image", "{}/empty", "--out", "{}/out"], "no pictures for --layout folder"),
        (["image", "{}/raw", "--out", "{}/out", "--only", "chair"], "--only 'chair' must be FIELD=A,B"),
        (["image", "{}/raw", "--out", "{}/out", "--layout", "imagenet"], "invalid choice: 'imagenet'"),
        (["image", "{}/raw", "--out", "{}/out", "--size", "big"], "argument --size: invalid int value: 'big'"),
        (["image", "{}/raw", "--out", "{}/out", "--sise", "8"], "unrecognized arguments: --sise 8"),
        (["image", "{}/raw", "--out", "/proc/out"], "cannot write to /proc/out"),
        (["verify", "{}/empty"], "no index.json and no .tar files there"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], line: str) -> None:
    (tmp_path / "empty").mkdir()
    for i in range(30):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
    result = job(*(argument.format(tmp_path) for argument in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and line in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_verify_of_a_damaged_set_exits_with_2(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 10)
    (tmp_path / "set/000001.tar").unlink()
    result = job("verify", str(tmp_path / "set"))
    assert result.returncode == 2 and "1 problems; restore those shards" in result.stderr


def test_archives_in_place_of_pictures_are_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with zipfile.ZipFile(tmp_path / "raw" / "0.png", "w") as archive:
        archive.writestr("../../escape.png", png(0))
    save_picture(tmp_path / "raw" / "1.png")
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    assert [name for name, _ in made.skipped] == ["0.png"]
