"""Captions of raw data: several of an item, tables of them, and those that templates make."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from test_scene_layouts import write_transforms
from test_shape_layouts import occupancy_networks
from test_shape_layouts import plan as shape_plan
from tiny_sets import by_key, save_picture

from distributed_inr.data.prepare import Plan, describe, prepare_set
from distributed_inr.domains.domain import captions
from distributed_inr.raw.posed_views import Form


def pictures(root: Path, rows: list[dict[str, Any]]) -> None:
    """A picture for every key that the rows name, and the rows beside them."""
    for number, key in enumerate(dict.fromkeys(row["key"] for row in rows)):
        save_picture(root / f"{key}.png", number)
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made(source: Path, plan: Plan | None = None, *, metadata: Path | None = None) -> dict[str, str]:
    """The txt of every record of the part that `split="none"` gives."""
    out = source.parent / "out"
    found = by_key(prepare_set(source, str(out), plan or Plan(split="none"), metadata=metadata).parts["train"])
    return {key: record.get("txt", b"").decode() for key, record in found.items()}


# Caption files


def test_a_samples_text_is_its_captions_one_a_line() -> None:
    assert captions("a chair\r\n\n  \t\n an oak chair \n") == ["a chair", "an oak chair"]
    assert captions("") == [] and captions("a\u2028b") == ["a\u2028b"]


def test_lists_and_rows_of_one_item_add_their_captions_without_repetitions(tmp_path: Path) -> None:
    rows = [
        {"key": "a", "text": ["Oak\n  chair", "", " "], "class": "chair"},
        {"key": "b", "class": "table"},
        {"key": "a", "text": "a seat", "colour": "red"},
        {"key": "a", "text": ["Oak chair", "a throne"]},
        {"key": "c", "class": "lamp", "text": None},
    ]
    pictures(tmp_path / "raw", rows)
    assert made(tmp_path / "raw") == {"a": "Oak chair\na seat\na throne", "b": "table", "c": ""}
    assert describe(str(tmp_path / "out/train"))["most frequent captions"] == {
        "Oak chair": 1,
        "a seat": 1,
        "a throne": 1,
        "table": 1,
    }
    record = by_key(prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none")).parts["train"])["a"]
    assert json.loads(record["json"]) == {"class": "chair", "colour": "red"}


def test_another_caption_of_many_is_another_source(tmp_path: Path) -> None:
    pictures(tmp_path / "raw", [{"key": "a", "text": ["one", "two"]}])
    made(tmp_path / "raw")
    pictures(tmp_path / "raw", [{"key": "a", "text": ["one", "three"]}])
    with pytest.raises(ValueError, match="holds a set made with source="):
        made(tmp_path / "raw")


def test_a_text_that_is_no_caption_is_named_by_line(tmp_path: Path) -> None:
    pictures(tmp_path / "raw", [{"key": "a", "text": "x"}, {"key": "a", "text": [["y"]]}])
    with pytest.raises(ValueError, match="metadata.jsonl, line 2: text must be a string or a list of strings$"):
        made(tmp_path / "raw")


def test_a_table_is_read_as_json_lines_are(tmp_path: Path) -> None:
    save_picture(tmp_path / "raw" / "a.png", 1)
    save_picture(tmp_path / "raw" / "b.png", 2)
    table = tmp_path / "Captions.CSV"
    table.write_bytes(
        '\ufefffile_name,text,class,note\nraw/a.png,"A ""tall"", oak\nchair",chair,\nraw/b.png,,table,x\n'.encode()
    )
    assert made(tmp_path / "raw", metadata=table) == {"a": 'A "tall", oak chair', "b": "table"}
    found = by_key(
        prepare_set(tmp_path / "raw", str(tmp_path / "out"), Plan(split="none"), metadata=table).parts["train"]
    )
    assert [json.loads(found[key]["json"]) for key in "ab"] == [{"class": "chair"}, {"class": "table", "note": "x"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"key,text\na,x\nb,y,z\n", "line 3 is no row of a table: more cells than the header's 2; mend it"),
        (b'key,text\na,"x\n', "line 2 is no row of a table: unexpected end of data; mend it"),
        (b"name,text\na,x\n", "line 2 has neither file_name nor key; name the picture it describes"),
        (b"key,text\na,na\xefve\n", "is not UTF-8 .*; save it as UTF-8"),
        (b"key,text\nz,x\n", "captions.csv names 1 files that are not in .*raw, first 'z'; restore"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    save_picture(tmp_path / "raw" / "a.png")
    (tmp_path / "captions.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        made(tmp_path / "raw", metadata=tmp_path / "captions.csv")
    assert "\n" not in str(caught.value)


TEXT2SHAPE = """id,modelId,description,category,topLevelSynsetId,subSynsetIds
1,model0,"a brown chair, with arms",Chair,03001627,"03001627,02738535"
2,other,a round table,Table,04379243,04379243
3,model0,A wooden seat,Chair,03001627,03001627
4,model1,,Chair,03001627,03001627
5,other,a table,Table,04379243,04379243
"""


def test_text2shapes_table_describes_models_by_their_ids_and_others_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    occupancy_networks(tmp_path / "raw")
    table = tmp_path / "captions.tablechair.csv"
    table.write_text(TEXT2SHAPE)
    with caplog.at_level(logging.INFO):
        found = made(tmp_path / "raw", shape_plan(layout="occupancy-networks"), metadata=table)
    assert found == {
        "03001627/model0": "a brown chair, with arms\nA wooden seat",
        "03001627/model1": "chair",
        "03001627/model2": "chair",
    }
    assert "captions.tablechair.csv: 1 of its 3 models are not in" in caplog.text
    record = by_key(
        prepare_set(
            tmp_path / "raw", str(tmp_path / "out"), shape_plan(layout="occupancy-networks"), metadata=table
        ).parts["train"]
    )["03001627/model0"]
    about = json.loads(record["json"])
    assert about["class"] == "chair" and about["category"] == "Chair" and not {"id", "modelId"} & about.keys()


def test_a_table_of_another_collection_is_one_clear_line(tmp_path: Path) -> None:
    occupancy_networks(tmp_path / "raw")
    (tmp_path / "other.csv").write_text("modelId,description\nx1,a chair\nx2,a chair\n")
    with pytest.raises(ValueError, match="other.csv names 2 models, none of them in .*raw, first 'x1'; give the table"):
        made(tmp_path / "raw", shape_plan(layout="occupancy-networks"), metadata=tmp_path / "other.csv")


def test_models_are_found_in_every_layout_by_folder_or_file(tmp_path: Path) -> None:
    save_picture(tmp_path / "pictures/raw/chairs/m1/front.png", 1)
    save_picture(tmp_path / "pictures/raw/chairs/m2.png", 2)
    write_transforms(tmp_path / "scenes/raw/chairs/m1", side=16, count=4)
    write_transforms(tmp_path / "views/raw/m1", side=16, count=3)
    (tmp_path / "t.csv").write_text("modelId,description\nm1,one\nm1,uno\nm2,two\nm3,three\n")
    one, table = "one\nuno", tmp_path / "t.csv"
    assert made(tmp_path / "pictures/raw", metadata=table) == {"chairs/m1/front": one, "chairs/m2": "two"}
    scenes = Plan(domain="scene", form=Form(size=16, num_points=50), split="none")
    assert made(tmp_path / "scenes/raw", scenes, metadata=table) == {"chairs/m1": one}
    assert set(made(tmp_path / "views/raw", Plan(layout="views", split="none"), metadata=table).values()) == {one}
