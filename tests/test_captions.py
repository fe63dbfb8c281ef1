"""Captions of raw data: several of an item, tables of them, and those that templates make."""

import hashlib
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
        (b"name,text\na,x\n", "line 2 has neither file_name, key nor modelId; name what it describes"),
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
    frame = sorted((tmp_path / "views/raw/m1").rglob("*.png"))[0].stem  # a name of no model
    table.write_text(table.read_text() + f"{frame},a frame\n")
    assert set(made(tmp_path / "views/raw", Plan(layout="views", split="none"), metadata=table).values()) == {one}


# Templates


def templates(*captions: str, **changes: Any) -> Plan:
    return Plan(**{"split": "none", "captions": captions, **changes})


def sized(key: str, width: Any, depth: Any, height: Any, **about: Any) -> dict[str, Any]:
    return {"key": key, "width_cm": width, "depth_cm": depth, "height_cm": height, "text": f"Seat {key}", **about}


def test_templates_are_filled_in_lower_case_with_each_own_caption(tmp_path: Path) -> None:
    rows = [
        {"key": "a", "text": ["TV stand", "Low table"], "class": "coffee_table", "legs": 4.0, "weight": 2.5},
        {"key": "b", "text": "Low  table", "class": "coffee_table", "legs": 3, "category": "Living room"},
    ]
    pictures(tmp_path / "raw", rows)
    plan = templates("{text}", "A {class}", "{text} of {legs} legs, {weight} kg", "{text}, {category}", "a {{thing}}")
    assert made(tmp_path / "raw", plan) == {
        "a": "tv stand\nlow table\na coffee table\ntv stand of 4 legs, 2.5 kg\nlow table of 4 legs, 2.5 kg\na {thing}",
        "b": "low table\na coffee table\nlow table, living room\na {thing}",
    }


def test_sizes_are_words_for_the_outer_thirds_of_a_class(tmp_path: Path) -> None:
    rows = [
        sized(f"c{i}", 10 * width, 50, height, **{"class": "chair"})
        for i, (width, height) in enumerate(
            [(6, 10), (5, 20), (4, 30), (3, 40), (2, 50), (1, 90)]  # volumes over 5,000: 6, 10, 12, 12, 10, 9
        )
    ]
    rows += [sized(f"t{i}", 500 + i, 500, 500, **{"class": "table"}) for i in range(2)]  # too few to compare
    rows += [sized(f"x{i}", 1 + i, 1, 1) for i in range(3)]
    pictures(tmp_path / "raw", rows)
    found = made(tmp_path / "raw", templates("{size}", "{height}", "{width}"))
    assert {key: text.split() for key, text in found.items()} == {
        "c0": ["small", "low", "wide"],
        "c1": ["low", "wide"],
        "c2": ["large"],
        "c3": ["large"],
        "c4": ["tall", "narrow"],
        "c5": ["small", "tall", "narrow"],
        "t0": [],
        "t1": [],
        "x0": ["small", "narrow"],
        "x1": [],
        "x2": ["large", "wide"],
    }


def test_equal_measurements_share_a_word_or_have_none(tmp_path: Path) -> None:
    heights = {"a": 1, "b": 1, "c": 1, "d": 2, "e": 3, "f": 3}
    pictures(tmp_path / "raw", [sized(key, 7, 7, height) for key, height in heights.items()])
    found = made(tmp_path / "raw", templates("{height}", "{text}"))
    # Of six the outer thirds are two: three equal ones are not two, and two are.
    assert found == {key: ("tall\n" if key in "ef" else "") + f"seat {key}" for key in heights}


def test_objects_are_compared_once_however_many_views_they_have(tmp_path: Path) -> None:
    rows = []
    for number, views in enumerate((1, 1, 9)):
        write_transforms(tmp_path / "views" / f"o{number}", side=16, count=views)
        rows.append(sized(f"o{number}", 1 + number, 1, 1))
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = made(tmp_path / "views", templates("{size}", layout="views"))
    assert {(key.split("/")[0], text) for key, text in found.items()} == {("o0", "small"), ("o1", ""), ("o2", "large")}


@pytest.mark.parametrize("value", [None, "unknown", 0, -3, "nan", "inf", [3]])
def test_what_is_no_length_is_not_compared(tmp_path: Path, value: Any) -> None:
    rows = [sized(f"a{i}", i + 1, 1, str(i + 1)) for i in range(3)] + [sized("b", 0.5, 1, value)]
    pictures(tmp_path / "raw", rows)
    found = made(tmp_path / "raw", templates("{size}", "{height}"))
    assert found == {"a0": "small\nlow", "a1": "", "a2": "large\ntall", "b": ""}


def test_a_field_of_the_metadata_goes_before_a_word_for_the_measurements(tmp_path: Path) -> None:
    pictures(tmp_path / "raw", [sized(f"{i}", i + 1, 1, 1, **({"size": "Mid"} if i == 0 else {})) for i in range(3)])
    assert made(tmp_path / "raw", templates("{size}")) == {"0": "mid", "1": "", "2": "large"}


def test_a_template_that_lacks_a_value_gives_no_caption(tmp_path: Path) -> None:
    rows = [{"key": "a", "text": "Chair", "colour": "Red"}, {"key": "b", "text": "Chair", "colour": " "}, {"key": "c"}]
    pictures(tmp_path / "raw", rows)
    plan = templates("a {colour} {text}", "a {text}")
    assert made(tmp_path / "raw", plan) == {"a": "a red chair\na chair", "b": "a chair", "c": ""}
    assert "txt" not in by_key(prepare_set(tmp_path / "raw", str(tmp_path / "out"), plan).parts["train"])["c"]


@pytest.mark.parametrize(
    ("template", "text", "caption"),
    [
        ("a {text}", "Armchair", "an armchair"),
        ("A {text}", "oak chair", "an oak chair"),
        ("{text} or a  {text}", "Oven", "oven or an oven"),
        ("a {text}", "upper cabinet", "an upper cabinet"),
        ("a {text}", "Urn", "an urn"),
        ("a {text}", "Urinal", "a urinal"),
        ("a {text}", "utility cart", "a utility cart"),
        ("a {text}", "European bed", "a european bed"),
        ("a {text}", "one-seater", "a one-seater"),
        ("a {text}", "onesie", "an onesie"),
        ("a {text}", "chair", "a chair"),
        ("a good {text}", "oven", "a good oven"),
        ("vista {text}", "oven", "vista oven"),
        ("{text} {text}", "plan a", "plan a plan a"),
        ("{text} {class}", "plan a", "plan a oven"),
    ],
)
def test_the_article_before_a_value_fits_its_sound(tmp_path: Path, template: str, text: str, caption: str) -> None:
    pictures(tmp_path / "raw", [{"key": "a", "text": text, "class": "oven"}])
    assert made(tmp_path / "raw", templates(template)) == {"a": caption}


@pytest.mark.parametrize("template", ["a {", "a }", "{}", "{text!r}", "{text:>9}", "{a{b}}", "", " \n"])
def test_a_malformed_template_is_one_clear_line(template: str) -> None:
    with pytest.raises(ValueError, match=r"^--caption '.*it must be text with placeholders as \{class\}") as caught:
        templates(template)
    assert "\n" not in str(caught.value)


def test_a_placeholder_that_no_item_has_a_value_for_is_one_clear_line(tmp_path: Path) -> None:
    pictures(tmp_path / "raw", [{"key": "a", "text": "x", "class": "chair", "empty": "", "list": [1], "yes": True}])
    for name in ("colour", "size", "empty", "list", "yes", "text.upper"):
        with pytest.raises(ValueError) as caught:
            made(tmp_path / "raw", templates("{text}", f"a {{{name}}} {{text}}"))
        assert str(caught.value) == (
            f"--caption 'a {{{name}}} {{text}}': {{{name}}} is known of no item; use some of {{text}} {{class}}"
        )
    assert not (tmp_path / "out").exists()
    save_picture(tmp_path / "bare/raw/a.png")
    with pytest.raises(ValueError, match="use some of what --metadata says, which is nothing$"):
        made(tmp_path / "bare/raw", templates("{text}"))


def test_templates_change_neither_the_split_nor_what_is_chosen(tmp_path: Path) -> None:
    rows = [{"key": f"{i:02d}", "text": [f"Name {i % 8}", f"other {i}"], "class": "ab"[i % 2]} for i in range(24)]
    pictures(tmp_path / "raw", rows)
    sides: list[list[list[str]]] = []
    only = {"text": tuple(f"Name {i}" for i in range(6))}
    for name, own in (("plain", ()), ("made", ("a {class}",))):
        plan = Plan(split="text", val_fraction=0.4, only=only, captions=own)
        parts = prepare_set(tmp_path / "raw", str(tmp_path / name), plan).parts
        sides.append([list(by_key(parts[part])) for part in ("train", "val")])
    assert sides[0] == sides[1] and sum(map(len, sides[0])) == 18
    found = by_key(parts["val"])
    assert {record["txt"] for record in found.values()} <= {b"a a", b"an a", b"a b"}


def test_templates_are_recorded_and_sets_from_before_them_are_gone_on_with(tmp_path: Path) -> None:
    pictures(tmp_path / "raw", [{"key": "a", "text": "one"}, {"key": "b", "text": "two"}])
    made(tmp_path / "raw")
    begun = json.loads((tmp_path / "out/prepare.json").read_text())
    files = [["a", "a.png", (tmp_path / "raw/a.png").stat().st_size, "one", "train"]]
    files += [["b", "b.png", (tmp_path / "raw/b.png").stat().st_size, "two", "train"]]
    digest = hashlib.sha256("".join(map(json.dumps, files)).encode()).hexdigest()[:16]
    assert "captions" not in begun and begun["source"] == digest  # as they were before there were templates
    with pytest.raises(
        ValueError, match=r"holds a set made with captions=None, now \['a \{text\}'\] \(2 differ: captions"
    ):
        made(tmp_path / "raw", templates("a {text}"))
    (tmp_path / "out").rename(tmp_path / "before")
    made(tmp_path / "raw", templates("a {text}"))
    assert json.loads((tmp_path / "out/train/index.json").read_text())["protocol"]["captions"] == ["a {text}"]
    assert made(tmp_path / "raw", templates("a {text}")) == {"a": "a one", "b": "a two"}


def test_other_measurements_are_another_source_where_captions_are_made_of_them(tmp_path: Path) -> None:
    for widths, message in (((1, 2, 3), ""), ((1, 2, 4), ""), ((3, 2, 1), "holds a set made with source=")):
        pictures(tmp_path / "raw", [sized(f"{i}", width, 1, 1) for i, width in enumerate(widths)])
        if message:
            with pytest.raises(ValueError, match=message):
                made(tmp_path / "raw", templates("{width}"))
        else:
            made(tmp_path / "raw", templates("{width}"))
