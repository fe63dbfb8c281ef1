"""Preparing pictures: every kind of file, the splits, the layouts, interruptions, and mistakes."""

import json
from pathlib import Path

import pytest
from tiny_sets import by_key, png, save_picture, write_set

from distributed_inr.data import prepare, storage
from distributed_inr.data.prepare import Plan, describe, prepare_set, verify
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.data.shards import load_index
from distributed_inr.domains.domain import Record
from distributed_inr.raw.pictures import Form

ROOT = Path(__file__).resolve().parents[1]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Folders


def test_a_class_per_folder_becomes_caption_and_class(tmp_path: Path) -> None:
    for i in range(6):
        save_picture(tmp_path / "raw" / ("red_chair" if i % 2 else "table") / f"{i}.png", i)
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    found = by_key(made.parts["train"])
    assert sorted(found) == ["red_chair/1", "red_chair/3", "red_chair/5", "table/0", "table/2", "table/4"]
    assert found["red_chair/1"]["txt"] == b"red chair"
    assert json.loads(found["table/0"]["json"]) == {"class": "table"}
    assert found["table/0"]["png"] == (tmp_path / "raw/table/0.png").read_bytes()


def test_captions_come_from_metadata_by_file_name_or_key(tmp_path: Path) -> None:
    for i in range(3):
        save_picture(tmp_path / "raw" / f"{i}.v1.png", i)
    rows = [{"file_name": "0.v1.png", "text": "na\u00efve", "class": "x", "width": 3}, {"key": "1_v1", "text": "one"}]
    (tmp_path / "raw" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    found = by_key(prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none")).parts["train"])
    assert found["0_v1"]["txt"].decode() == "na\u00efve"
    assert json.loads(found["0_v1"]["json"]) == {"class": "x", "width": 3}
    assert found["1_v1"]["txt"] == b"one"
    assert "txt" not in found["2_v1"]


def test_metadata_that_names_missing_files_is_one_clear_line(tmp_path: Path) -> None:
    save_picture(tmp_path / "raw" / "0.png")
    (tmp_path / "raw" / "metadata.jsonl").write_text('{"file_name": "a/gone.png", "text": "x"}\n')
    with pytest.raises(
        ValueError, match=r"^metadata.jsonl names 1 files that are not in .*raw, first 'a/gone.png'; rest"
    ):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ['{"file_name": ', "[1]", '{"text": "x"}'])
def test_metadata_that_is_not_json_lines_is_named_by_line(tmp_path: Path, line: str) -> None:
    save_picture(tmp_path / "raw" / "0.png")
    (tmp_path / "raw" / "metadata.jsonl").write_text('{"file_name": "0.png"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2 "):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan())


def test_bad_files_are_listed_and_left_out(tmp_path: Path) -> None:
    for i in range(5):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
    (tmp_path / "raw" / "1.png").write_bytes(b"garbage")
    (tmp_path / "raw" / "3.png").write_bytes(png(0, 16)[:-50])
    save_picture(tmp_path / "raw" / "4.png", size=40)
    (tmp_path / "raw" / "notes.txt").write_text("not a picture")
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none", form=Form(max_pixels=1000)))
    assert sorted(by_key(made.parts["train"])) == ["0", "2"]
    assert [name for name, _ in made.skipped] == ["1.png", "3.png", "4.png"]
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert lines[2] == "4.png\t40 x 40 pixels, above the limit of 1000"


@pytest.mark.parametrize("kind", ["empty", "missing", "a file", "only others"])
def test_a_source_without_pictures_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "raw"
    if kind == "a file":
        source.write_text("x")
    elif kind != "missing":
        source.mkdir()
        (source / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"raw(: no pictures for --layout folder; check| is not a folder; give)"):
        prepare_set(source, str(tmp_path / "out"), Plan())
    assert not (tmp_path / "out").exists()


def test_a_source_of_bad_pictures_only_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.png").write_bytes(b"garbage")
    with pytest.raises(
        ValueError, match=r"no samples were written, so there is no set: 0\.png and all others .*cannot"
    ):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))


def test_two_files_of_one_name_get_two_keys(tmp_path: Path) -> None:
    save_picture(tmp_path / "raw" / "a.png", 0)
    save_picture(tmp_path / "raw" / "a.jpg", 1)
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    assert sorted(by_key(made.parts["train"])) == ["a", "a-png"]


# Splits


def split_keys(made: prepare.Prepared) -> tuple[set[str], set[str]]:
    return set(by_key(made.parts["train"])), set(by_key(made.parts["val"]))


def test_equal_captions_are_never_on_both_sides(tmp_path: Path) -> None:
    rows = []
    for i in range(40):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
        rows.append({"file_name": f"{i}.png", "text": ["Chair", " chair", "CHAIR"][i % 3] + f" {i % 10}"})
    (tmp_path / "raw" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(val_fraction=0.3))
    train, val = split_keys(made)
    assert made.parts["train"].protocol["split"] == "text"
    assert not {int(k) % 10 for k in train} & {int(k) % 10 for k in val}
    assert len(train | val) == 40


def make_views(root: Path, objects: int = 8, views: int = 3) -> None:
    rows = []
    for i in range(objects):
        for view in range(views):
            save_picture(root / "views" / f"object-{i}" / f"{view:03d}.png", 10 * i + view)
        frames = [{"file_path": f"{view:03d}.png"} for view in range(views)]
        (root / "views" / f"object-{i}" / "transforms.json").write_text(json.dumps({"frames": frames}))
        rows.append({"key": f"object-{i}", "file_name": f"images/{i}.png", "text": f"Thing {i}", "class": "ab"[i % 2]})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_views_of_an_object_stay_together(tmp_path: Path) -> None:
    make_views(tmp_path)
    plan = Plan(layout="views", val_per_class=1)
    train, val = split_keys(prepare_set(tmp_path / "views", str(tmp_path / "out"), plan))
    objects = [{key.split("/")[0] for key in side} for side in (train, val)]
    assert not objects[0] & objects[1]
    assert len(objects[1]) == 2 and {int(o[-1]) % 2 for o in objects[1]} == {0, 1}
    assert len(val) == 6 and len(train) == 18
    found = by_key(load_index(str(tmp_path / "out" / "train")))
    key = sorted(found)[0]
    assert found[key]["txt"].decode() == f"Thing {key[7]}"


def test_pictures_are_chosen_by_their_metadata(tmp_path: Path) -> None:
    make_views(tmp_path)
    plan = Plan(layout="views", only={"class": ("b",)}, split="none")
    found = by_key(prepare_set(tmp_path / "views", str(tmp_path / "out"), plan).parts["train"])
    assert {key.split("/")[0] for key in found} == {"object-1", "object-3", "object-5", "object-7"}
    with pytest.raises(ValueError, match=r"no pictures for --layout views --only class=c; check"):
        prepare_set(tmp_path / "views", str(tmp_path / "other"), Plan(layout="views", only={"class": ("c",)}))


def test_a_view_that_is_missing_or_outside_is_refused(tmp_path: Path) -> None:
    make_views(tmp_path)
    (tmp_path / "views/object-3/001.png").unlink()
    with pytest.raises(ValueError, match=r"object-3/transforms.json names '001.png', which is not there"):
        prepare_set(tmp_path / "views", str(tmp_path / "out"), Plan(layout="views"))
    frames = {"frames": [{"file_path": "../object-1/000.png"}]}
    (tmp_path / "views/object-3/transforms.json").write_text(json.dumps(frames))
    with pytest.raises(ValueError, match=r"names '../object-1/000.png', which is not there"):
        prepare_set(tmp_path / "views", str(tmp_path / "out"), Plan(layout="views"))


def test_a_growing_set_keeps_its_split(tmp_path: Path) -> None:
    for i in range(60):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
    _, before = split_keys(prepare_set(tmp_path / "raw", str(tmp_path / "a"), Plan(val_fraction=0.2)))
    for i in range(60, 80):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
    train, after = split_keys(prepare_set(tmp_path / "raw", str(tmp_path / "b"), Plan(val_fraction=0.2)))
    assert before <= after and not before & train


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(split="text"), "--split text needs a caption for every item"),
        (Plan(split="given"), "--split given needs every item under train/"),
        (
            Plan(split="fraction", val_fraction=1e-9),
            r"--split fraction over 3 of them leaves val empty; raise --val-fraction 1e-09 \(one of them is 0.33\)",
        ),
        (
            Plan(split="fraction", val_per_class=5),
            "--split fraction over 3 of them leaves train empty; lower --val-fraction or --val-per-class, or",
        ),
    ],
)
def test_splits_that_cannot_be_are_one_clear_line(tmp_path: Path, plan: Plan, message: str) -> None:
    for i in range(3):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
    with pytest.raises(ValueError, match=message):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan)


# Interruptions


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(40):
        save_picture(tmp_path / "raw" / f"{i:02d}.png", i)
    (tmp_path / "raw" / "07.png").write_bytes(b"garbage")
    plan = Plan(val_fraction=0.2, shard_samples=5)
    prepare_set(tmp_path / "raw", str(tmp_path / "whole"), plan)

    real, calls = ShardWriter.write, iter(range(10**6))
    with monkeypatch.context() as patch:

        def dying(self: ShardWriter, record: Record) -> None:
            if next(calls) in (13, 14 + 9):
                raise KeyboardInterrupt
            real(self, record)

        patch.setattr(ShardWriter, "write", dying)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                prepare_set(tmp_path / "raw", str(tmp_path / "parts"), plan)
            assert not (tmp_path / "parts/train/index.json").exists()
    made = prepare_set(tmp_path / "raw", str(tmp_path / "parts"), plan)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert [name for name, _ in made.skipped] == ["07.png"]


def test_a_finished_set_is_left_as_it_is(tmp_path: Path) -> None:
    for i in range(10):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
    plan = Plan(val_fraction=0.3)
    first = prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.tar")}
    again = prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan)
    assert again.parts == first.parts
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.tar")} == before


def test_other_settings_or_files_are_refused_and_leave_the_set_intact(tmp_path: Path) -> None:
    for i in range(10):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
    prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(val_fraction=0.3))
    before = files(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"holds a set made with form.size=None, now 8 \(1 differ: form.size\); choose"
    ):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(val_fraction=0.3, form=Form(size=8)))
    save_picture(tmp_path / "raw" / "10.png")
    with pytest.raises(ValueError, match="holds a set made with source="):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(val_fraction=0.3))
    assert files(tmp_path / "out") == before


def test_a_folder_in_which_nothing_was_written_takes_other_settings(tmp_path: Path) -> None:
    for i in range(3):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
    with pytest.raises(ValueError, match="no samples were written"):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none", form=Form(size=4096)))
    made = prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none", form=Form(size=8)))
    assert made.parts["train"].num_samples == 3


def test_a_folder_with_other_peoples_shards_is_refused(tmp_path: Path) -> None:
    save_picture(tmp_path / "raw" / "0.png")
    write_set(tmp_path / "out" / "train", 3)
    before = files(tmp_path / "out")
    with pytest.raises(
        ValueError, match="already holds train/000000.tar, not made by this command; choose another --out"
    ):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))
    assert files(tmp_path / "out") == before


def test_no_space_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture(tmp_path / "raw" / "0.png")

    def full(url: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_atomic", full)
    with pytest.raises(ValueError, match=r"^no space left in .*out; free some and run the same command again"):
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"))


def test_a_set_is_prepared_into_an_object_store(tmp_path: Path) -> None:
    import fsspec

    for i in range(4):
        save_picture(tmp_path / "raw" / f"{i}.png", i)
    made = prepare_set(tmp_path / "raw", "memory://bucket/prepared", Plan(split="none"))
    assert made.parts["train"].num_samples == 4
    store = fsspec.filesystem("memory")
    names = {name.removeprefix("/bucket/prepared/") for name in store.find("/bucket/prepared")}
    assert names == {"prepare.json", "skipped.txt", "train/000000.tar", "train/000000.tar.idx", "train/index.json"}
    store.rm("/bucket", recursive=True)


# Verify and describe


def test_verify_finds_nothing_in_a_good_set_and_every_fault_in_a_bad_one(tmp_path: Path) -> None:
    write_set(tmp_path / "set", 30)
    assert verify(str(tmp_path / "set")) == []
    content = bytearray((tmp_path / "set/000001.tar").read_bytes())
    content[600] ^= 1
    (tmp_path / "set/000001.tar").write_bytes(content)
    (tmp_path / "set/000003.tar").unlink()
    problems = verify(str(tmp_path / "set"))
    assert len(problems) == 3
    assert (
        "000001.tar has sha256" in problems[0]
        and "007.png differs" in problems[1]
        and "000003.tar is missing" in problems[2]
    )


def test_describe_counts(tmp_path: Path) -> None:
    make_views(tmp_path)
    prepare_set(tmp_path / "views", str(tmp_path / "out"), Plan(layout="views", split="none"))
    about = describe(str(tmp_path / "out" / "train"))
    assert about["samples"] == 24 and about["classes"] == {"a": 12, "b": 12} and about["captions"] == 8
    assert about["members"] == {"json": 24, "png": 24, "txt": 24}
    assert about["protocol"]["layout"] == "views"
