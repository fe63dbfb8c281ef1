"""Measures of text: against closed forms, and of a model whose samples are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PillowImage
from tiny_run import write_pictures, write_run
from tiny_solids import BALL, BOX, DOMAIN, grid, solid_model, write_solids

from distributed_inr.domains.domain import captions
from distributed_inr.domains.image import to_pillow
from distributed_inr.evaluation import classifier, metrics, text
from distributed_inr.evaluation.classifier import Labelled, cross_validated, labelled, train_classifier, unseen_captions
from distributed_inr.evaluation.distances import Observer, Traits
from distributed_inr.evaluation.splits import Split
from distributed_inr.evaluation.text_report import text_section, write_confusion
from distributed_inr.generation import load
from distributed_inr.models.torchvision_cpu import import_torchvision

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
OPENAI_MEAN, OPENAI_DEVIATION = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def test_total_mutual_difference_is_that_by_hand():
    numbers = torch.tensor([[0.0, 0], [3, 4], [0, 8], [1, 1], [1, 1], [1, 1]])
    # Root mean square differences 5, 8, 5 over sqrt 2; each sample's mean distance to the two others, summed.
    first = ((5 + 8) / 2 + (5 + 5) / 2 + (8 + 5) / 2) / 2**0.5
    found = text.total_mutual_difference(Traits(numbers, [], None), 3)
    assert found["value"] == pytest.approx(first / 2) and found["prompts"] == 2
    assert found["distance"] == "root mean square difference of 2 numbers"

    points = torch.tensor([[[0.0, 0, 0]], [[1, 0, 0]], [[0, 2, 0]]])  # squared distances 1, 4, 5, there and back
    found = text.total_mutual_difference(Traits(numbers[:3], [], points), 3)
    assert found["value"] == pytest.approx(2 * ((1 + 4) / 2 + (1 + 5) / 2 + (4 + 5) / 2))
    assert found["distance"] == "Chamfer distance of 1 surface points" and found["empty_samples"] == 0


def test_total_mutual_difference_has_the_chamfer_distances_of_all_pairs():
    surfaces = torch.rand(4, 50, 3, generator=torch.Generator().manual_seed(0))
    pairs = [metrics.chamfer(surfaces[i : i + 1], surfaces[j : j + 1]) for i in range(4) for j in range(i)]
    found = text.total_mutual_difference(Traits(torch.zeros(4, 2), [], surfaces), 4)
    assert found["value"] == pytest.approx(4 * sum(pairs).item() / 6, rel=1e-5)


def test_total_mutual_difference_leaves_out_samples_without_a_surface():
    points = torch.tensor([[[0.0, 0, 0]], [[1, 0, 0]], [[0, 2, 0]], [[0, 0, 0]], [[9, 9, 9]], [[0, 0, 0]]])
    points[2] = points[4] = points[5] = torch.nan
    found = text.total_mutual_difference(Traits(torch.zeros(6, 2), [], points), 3)
    assert found["value"] == pytest.approx(3 * 2.0)  # the one pair of the first prompt, for three samples
    assert found["prompts"] == 1 and found["empty_samples"] == 3
    assert text.total_mutual_difference(Traits(torch.zeros(2, 2), [], points[4:]), 2)["value"] is None


def test_clip_score_is_a_hundred_times_the_mean_cosine_without_negative_ones():
    tower = text.ImageTower("mean colour", lambda p: p.mean((2, 3)), size=4, mean=ZERO, std=ONE)
    pictures = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])[..., None, None].expand(-1, -1, 4, 4)
    texts = torch.tensor([[5.0, 0, 0], [3, 4, 0], [0, 0, -1]])
    assert text.clip_score(tower(pictures), texts) == pytest.approx(100 * (1 + 0.8 + 0) / 3)


@pytest.mark.parametrize("shape", [(64, 64), (20, 20), (24, 60)])
@pytest.mark.parametrize(("resize_mode", "interpolation"), [("shortest", "bicubic"), ("squash", "bilinear")])
def test_pictures_reach_the_image_tower_as_open_clip_prepares_them(
    shape: tuple[int, int], resize_mode: Any, interpolation: Any
):
    import_torchvision()
    import open_clip

    about: Any = {"resize_mode": resize_mode, "interpolation": interpolation, "mean": OPENAI_MEAN}
    about["std"] = OPENAI_DEVIATION
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    picture = F.interpolate(coarse, size=shape, mode="bicubic").clamp(0, 1).mul(255).round() / 255
    expected = open_clip.image_transform(32, is_train=False, **about)(to_pillow(picture[0]))
    tower = text.ImageTower("", torch.nn.Flatten(), size=32, **about)
    torch.testing.assert_close(tower(picture).view(3, 32, 32), expected, rtol=0, atol=2 / 255 / 0.26)  # 8 bits


def test_confusion_has_a_row_for_each_true_class():
    predicted, true = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 1, 0])
    assert text.confusion(predicted, true, "abc").tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_captions_are_the_lines_that_say_something():
    assert captions("A chair\n\n  \nof wood\n") == ["A chair", "of wood"] and captions("") == []


def test_unseen_captions_are_those_of_held_out_signals_alone_each_once():
    known = [Labelled(0, "ball", "A ball\nround"), Labelled(1, "", "a thing")]
    others = [
        Labelled(0, "ball", "a ball\nRed ball"),
        Labelled(1, "box", "red  box\nred ball"),
        Labelled(2, "", "odd"),
    ]
    assert unseen_captions(known, others, ["ball", "box"]) == [("Red ball", "ball"), ("red  box", "box")]
    assert ("odd", "") in unseen_captions(known, others, [])


@pytest.fixture(scope="module")
def solids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("solids")
    names: list[str | None] = ["ball", "box"] * 9 + [None, "cone"]
    write_solids(folder / "train", names, [f"{n} {i % 7}" for i, n in enumerate(names)], seed=1, raw=b"{")
    held_out = ["ball", "box", "ball", "box", "cone"]
    write_solids(folder / "val", [*held_out], ["ball 0", "new box", "new ball", "New box", "a cone"], seed=2)
    return folder


def traits_of(folder: Path, part: str) -> tuple[Traits, torch.Tensor]:
    """The traits of balls and boxes, and which they are."""
    split = Split(solid_model(folder), str(folder / part))
    known = [one for one in labelled(solid_model(folder), split) if one.name in ("ball", "box")]
    truths = [DOMAIN.truth(split.one(one.number)) for one in known]
    labels = torch.tensor([("ball", "box").index(one.name) for one in known])
    return Observer(DOMAIN, [metrics.EfficientNetLite0()], 0).traits(truths, lambda _: None), labels


def test_labels_are_those_of_the_records(solids: Path):
    model = solid_model(solids)
    known = labelled(model, Split(model, model.experiment.data.train))
    assert [one.number for one in known] == list(range(20))
    assert [one.name for one in known] == ["ball", "box"] * 9 + ["", "cone"]
    assert known[3].text == "box 3"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"class": 3}', b"\xff"])
def test_what_is_no_class_leaves_a_sample_without_one(tmp_path: Path, content: bytes):
    write_solids(tmp_path / "train", ["box", None], ["one", "two"], seed=1, raw=content)
    model = solid_model(tmp_path)
    known = labelled(model, Split(model, model.experiment.data.train))
    assert [(one.number, one.name, one.text) for one in known] == [(0, "box", "one"), (1, "", "two")]


def test_the_classifier_tells_balls_from_boxes_and_draws_nothing(solids: Path):
    traits, labels = traits_of(solids, "train")
    before = torch.get_rng_state()
    first, second = (train_classifier(traits, labels, ("ball", "box")) for _ in range(2))
    again = cross_validated(traits, labels, ("ball", "box"), [str(i) for i in range(len(labels))])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.weights, second.weights) and torch.equal(first.offsets, second.offsets)
    seen, true = traits_of(solids, "val")
    assert first.predict(seen).tolist() == true.tolist() and set(true.tolist()) == {0, 1}
    assert again.tolist() == labels.tolist()


def test_shuffled_labels_leave_the_classifier_at_chance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    rows = torch.randn(120, 40, generator=generator) + 4 * F.one_hot(labels, 40)
    traits, alone = Traits(rows, [rows], None), [str(i) for i in range(120)]
    assert (cross_validated(traits, labels, "abc", alone) == labels).float().mean() > 0.8
    shuffled = labels[torch.randperm(120, generator=generator)]
    right = (cross_validated(traits, shuffled, "abc", alone) == shuffled).float().mean()
    assert abs(right - 1 / 3) < 3 * (2 / 9 / 120) ** 0.5


def test_classes_weigh_the_same_however_many_signals_they_have():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(110) >= 100).long()
    rows = torch.randn(110, 1, generator=generator) + 1.5 * labels[:, None]
    told = train_classifier(Traits(rows, [rows], None), labels, "ab")
    line = torch.linspace(-3, 4, 701)[:, None]
    border = line[told.predict(Traits(line, [line], None)).argmax()].item()
    assert border == pytest.approx(0.75, abs=0.35)  # with the classes' own weights it would be at 2.3


def test_signals_of_one_group_are_told_together():
    """A row of noise that copies share would tell them, were they in several folds."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(40) % 2).repeat_interleave(3)
    rows = torch.randn(40, 60, generator=generator).repeat_interleave(3, dim=0)
    traits = Traits(rows, [rows], None)
    assert (cross_validated(traits, labels, "ab", [str(i) for i in range(120)]) == labels).float().mean() > 0.9
    together = cross_validated(traits, labels, "ab", [str(i // 3) for i in range(120)]) == labels
    assert together.float().mean() < 0.7


def test_the_nearest_training_shape_has_the_largest_iou(solids: Path):
    model = solid_model(solids)
    training = Split(model, model.experiment.data.train)
    truths = torch.cat([DOMAIN.truth(signal) for signal in training.batches(range(20))])
    queries = torch.stack([truths[4], torch.zeros(16, 16, 16), torch.from_numpy(grid(BALL, 0.3)).float()])
    found = text.nearest_training(DOMAIN, text.comparand(DOMAIN, queries), training, lambda _: None)
    assert found[:2].tolist() == [1, 0]
    assert found[2].item() == pytest.approx(metrics.iou(queries[2:].expand_as(truths), truths).max().item())


def test_the_nearest_training_picture_is_at_the_smallest_distance_mirrored_or_not(tmp_path: Path):
    write_pictures(tmp_path / "train", 7, seed=1)
    model = load(write_run(tmp_path, data__val=None))
    training = Split(model, model.experiment.data.train)
    truths = torch.cat([model.domain.truth(signal) for signal in training.batches(range(7))])
    queries = torch.stack([truths[6].flip(-1), (truths[2] + 0.01).clamp(max=1), torch.zeros(3, 16, 16)])
    found = text.nearest_training(model.domain, text.comparand(model.domain, queries), training, lambda _: None)
    assert found[0] == pytest.approx(0, abs=1e-3) and 0 < found[1] <= 0.0101
    assert found[2].item() == pytest.approx(truths.square().flatten(1).mean(1).sqrt().min().item(), rel=1e-4)


def draw_rightly(prompts: list[str], count: int) -> torch.Tensor:
    """Balls for "ball", boxes for "box", one ball in four samples for no text."""
    kinds = [BALL if "ball" in p or (not p and i % 4 == 0) else BOX for p in prompts for i in range(count)]
    radii = torch.linspace(0.45, 0.75, len(kinds))
    return torch.stack([torch.tensor(kinds), radii], dim=1)


def test_samples_that_follow_their_text_are_measured_as_such(solids: Path, tmp_path: Path):
    model, left_out, counted = solid_model(solids), {}, []
    training, held_out = Split(model, str(solids / "train")), Split(model, str(solids / "val"))
    result = text.measure_text(
        model, draw_rightly, training, held_out, left_out=left_out, count=4, advance=counted.append
    )
    assert list(result)[0] == "classifier" and result["classifier"]["classes"] == ["ball", "box"]  # one cone is too few
    assert result["classifier"]["held_out_accuracy"] == 1 and result["classifier"]["held_out_signals"] == 4
    assert result["classifier"]["training_signals"] == {"ball": 9, "box": 9}
    words, unseen = result["class words"], result["held-out captions"]
    assert words["prompts"] == ["a ball", "a box"] and unseen["prompts"] == ["new box", "new ball"]
    for found in (words, unseen):
        assert found["accuracy"] == 1 and found["confusion"] == [[4, 0], [0, 4]] and found["chance"] == 0.5
        assert found["chance_by_class"] == {"ball": 0.25, "box": 0.75}
    assert result["without text"]["taken_for"] == {"ball": 0.25, "box": 0.75}
    assert words["tmd"]["samples_per_prompt"] == 4 and words["tmd"]["value"] > 0
    assert "Chamfer" in words["tmd"]["distance"]
    nearest = result["nearest_training"]
    assert 0.5 < nearest["class words"]["median"] <= nearest["class words"]["nearest"] <= 1
    assert len(nearest["held out"]["values"]) == 5 and nearest["measure"] == "IoU"
    assert list(left_out) == ["clip_s"]
    assert json.loads(json.dumps(result)) == result
    assert sum(counted) == 18 + 4 + 8 * 3 + 20  # labelled, held out, drawn, all training signals

    assert write_confusion(result, tmp_path) == ["confusion.png"]
    with PillowImage.open(tmp_path / "confusion.png") as picture:
        assert np.asarray(picture).std() > 10 and min(picture.size) > 300
    page = "\n".join(text_section(result))
    assert (
        "100% of 4 held-out ones and 100% in cross-validation, but 100% of those" in page
        and "| 2 class words | 1.000 | 0.500 |" in page
    )
    assert "class words" in page and "CLIP-S" not in page


def test_samples_that_ignore_their_text_agree_by_chance(solids: Path):
    def draw(prompts: list[str], count: int) -> torch.Tensor:
        return draw_rightly([""] * len(prompts), count)

    model, left_out = solid_model(solids), {}
    found = text.measure_text(model, draw, Split(model, str(solids / "train")), None, left_out=left_out, count=4)
    assert found["class words"]["accuracy"] == found["class words"]["chance"] == 0.5
    assert found["class words"]["by_class"] == {"ball": 0.25, "box": 0.75}
    assert "held_out_accuracy" not in found["classifier"] and "held-out captions" in left_out


def test_clip_s_is_measured_where_the_encoder_has_an_image_tower(solids: Path):
    model, left_out = solid_model(solids), {}
    tower = text.ImageTower("tiny", lambda p: p.mean((2, 3)), size=8, mean=ZERO, std=ONE)
    found = text.measure_text(
        model,
        draw_rightly,
        Split(model, str(solids / "train")),
        None,
        left_out=left_out,
        count=2,
        tower=tower,
        encode_text=lambda prompts: torch.tensor([[1.0, 1, 1] if "ball" in p else [-1, -1, -1] for p in prompts]),
    )
    score = found["class words"]["clip_s"]
    assert score["encoder"] == "tiny" and 45 < score["value"] < 50  # balls are nearly grey, boxes opposite
    assert "clip_s" not in left_out and "CLIP-S on tiny." in text_section(found)


def test_more_classes_and_signals_than_are_told_are_thinned(solids: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classifier, "MAX_SIGNALS", 13)
    model, left_out = solid_model(solids), {}
    training = Split(model, str(solids / "train"))
    found = text.measure_text(model, draw_rightly, training, None, left_out=left_out, count=2)
    assert found["classifier"]["training_signals"] == {"ball": 6, "box": 6} and "other classes" not in left_out
    monkeypatch.setattr(classifier, "MIN_SIGNALS", 1)
    monkeypatch.setattr(classifier, "MAX_CLASSES", 2)
    found = text.measure_text(model, draw_rightly, training, None, left_out=left_out, count=2)
    assert found["classifier"]["classes"] == ["ball", "box"]
    assert left_out["other classes"] == "the 2 of the most training signals are told, of 3 classes"


def test_words_of_classes_are_said_as_captions_say_them(tmp_path: Path):
    names: list[str | None] = ["Urn-like_ball", "unit_box"] * 4
    write_solids(tmp_path / "train", names, ["one"] * 8, seed=1)
    model = solid_model(tmp_path)
    found = text.measure_text(model, draw_rightly, Split(model, str(tmp_path / "train")), None, left_out={}, count=2)
    assert found["class words"]["prompts"] == ["an urn like ball", "a unit box"]


def test_accuracy_is_left_out_where_too_few_classes_are_known(tmp_path: Path):
    write_solids(tmp_path / "train", ["ball"] * 5 + ["box"] * 3, ["one"] * 8, seed=1)
    write_solids(tmp_path / "val", ["ball"], ["two"], seed=2)
    model, left_out = solid_model(tmp_path), {}
    training, held_out = Split(model, str(tmp_path / "train")), Split(model, str(tmp_path / "val"))
    found = text.measure_text(model, draw_rightly, training, held_out, left_out=left_out, count=2)
    assert "classifier" not in found and "class words" not in found
    assert left_out["accuracy by text"].startswith("1 of the classes")
    assert found["held-out captions"]["prompts"] == ["two"] and "accuracy" not in found["held-out captions"]
    assert "accuracy" not in "\n".join(text_section(found)) and write_confusion(found, tmp_path) == []
