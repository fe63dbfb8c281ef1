"""Measures against closed forms, and the evaluation of a tiny real run."""

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PillowImage
from tiny_run import write_pictures, write_run

import distributed_inr as dinr
from distributed_inr.domains.image import Image
from distributed_inr.evaluation import metrics
from distributed_inr.evaluation.splits import SHOWN, Split, spread
from distributed_inr.models.torchvision_cpu import import_torchvision
from distributed_inr.training import checkpoint
from distributed_inr.training.engine import Optim, Scale, build_engine


def test_psnr_is_minus_ten_log_of_the_mean_squared_error_of_each_picture():
    truth = torch.full((2, 3, 8, 8), 0.5)
    found = truth.clone()
    found[0] += 0.1
    found[1, 0] += 0.3
    expected = [-10 * math.log10(0.01), -10 * math.log10(0.09 / 3)]
    torch.testing.assert_close(metrics.psnr(found, truth), torch.tensor(expected))


def test_ssim_of_a_flat_shift_has_a_closed_form():
    truth, found = torch.full((1, 3, 32, 32), 0.01), torch.full((1, 3, 32, 32), 0.03)
    # No contrast: only the luminance term is left; variances as small differences of float32 leave 3e-4.
    expected = (2 * 0.01 * 0.03 + 0.01**2) / (0.01**2 + 0.03**2 + 0.01**2)
    torch.testing.assert_close(metrics.ssim(found, truth), torch.tensor([expected]), rtol=0, atol=1e-3)
    assert metrics.ssim(torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)).shape == (3,)


def test_the_chamfer_distance_is_that_by_hand_in_pieces_or_not():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(40, 5, 3, generator=generator), torch.randn(40, 7, 3, generator=generator)
    pairs = (first[:, :, None] - second[:, None]).square().sum(-1)
    expected = pairs.min(2).values.mean(1) + pairs.min(1).values.mean(1)
    torch.testing.assert_close(metrics.chamfer(first, second), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics.chamfer(first[:1], second)[:1], expected[:1], rtol=1e-4, atol=1e-5)


def test_matching_is_perfect_for_copies_and_poor_for_one_shape_or_none():
    shapes = torch.rand(6, 30, 3, generator=torch.Generator().manual_seed(1)) + torch.arange(6.0).view(6, 1, 1)
    assert metrics.matching(shapes, shapes) == (pytest.approx(0, abs=1e-6), 1.0)
    distance, coverage = metrics.matching(shapes[:1].expand(4, -1, -1), shapes)
    assert coverage == pytest.approx(1 / 6) and distance > 1
    near = torch.cat([shapes[:1], shapes[:1] + 0.01])  # both are nearest to one, though each is nearest of some
    assert metrics.matching(near, shapes)[1] == pytest.approx(1 / 6)
    empty = torch.cat([shapes[:1], torch.full((1, 30, 3), torch.nan)])
    assert metrics.matching(empty, shapes) == (pytest.approx(distance), coverage)


def test_iou_and_accuracy_count_cells():
    truth = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    found = torch.tensor([[0.9, 0.2, 0.8, 0.1], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert metrics.iou(found, truth).tolist() == [pytest.approx(1 / 3), 1.0, 0.0]
    assert metrics.accuracy(found, truth).tolist() == [0.5, 1.0, 0.0]


def test_kid_is_the_unbiased_estimate_written_out():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 5, generator=generator), torch.randn(4, 5, generator=generator) + 1

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(a.double() @ b.double()) / 5 + 1) ** 3

    within_x = sum(kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    within_y = sum(kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    between = sum(kernel(a, b) for a in x for b in y) / 28
    assert metrics.kid(x, y)[0] == pytest.approx(within_x + within_y - 2 * between, rel=1e-9)


def test_kid_is_about_zero_for_one_distribution_and_grows_with_the_shift():
    generator = torch.Generator().manual_seed(0)
    draws = [metrics.kid(*torch.randn(2, 150, 20, generator=generator)) for _ in range(20)]
    values = torch.tensor([value for value, _ in draws])
    error = sum(error for _, error in draws) / 20
    assert values.mean().abs() < 3 * values.std() / 20**0.5
    assert 1 < error / values.std() < 3  # about 2 where the distributions are equal

    x, y = torch.randn(2, 150, 20, generator=generator)
    apart = [metrics.kid(x + 0.5, y) for x, y in torch.randn(20, 2, 150, 20, generator=generator)]
    deviation = torch.tensor([value for value, _ in apart]).std()
    assert 0.6 < sum(error for _, error in apart) / 20 / deviation < 1.6  # else it is the estimate's deviation
    shifted = [metrics.kid(x + shift, y)[0] for shift in (0.2, 0.5, 1.0)]
    assert 5 * error < shifted[0] < shifted[1] < shifted[2]


def test_efficientnet_lite0_tells_one_kind_of_picture_from_another():
    generator = torch.Generator().manual_seed(0)
    smooth = [F.interpolate(torch.rand(12, 3, 4, 4, generator=generator), size=64, mode="bicubic") for _ in "ab"]
    noise = torch.rand(12, 3, 64, 64, generator=generator)
    network = metrics.EfficientNetLite0()
    with torch.no_grad():
        first, second, other = (network(pictures.clamp(0, 1)) for pictures in (*smooth, noise))
    assert first.shape == (12, 1280) and not any(p.requires_grad for p in network.parameters())
    same, error = metrics.kid(first, second)
    assert abs(same) < 4 * error
    assert metrics.kid(first, other)[0] > 10 * abs(same) + 10 * error


def test_the_nearest_picture_is_found_at_its_root_mean_square_distance():
    reference = torch.zeros(3, 16)
    reference[1], reference[2] = 0.5, 1.0
    queries = torch.tensor([[0.6], [0.8], [0.1]]).expand(-1, 16)
    distances, indices = metrics.nearest(queries, reference)
    assert indices.tolist() == [1, 2, 0]
    torch.testing.assert_close(distances, torch.tensor([0.1, 0.2, 0.1]), rtol=1e-4, atol=1e-5)


def test_spread_numbers_are_even_and_distinct():
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(100, 4) == [12, 37, 62, 87]
    assert len(set(spread(1000, 333))) == 333


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_pictures(folder / "train", 13, seed=1)
    write_pictures(folder / "val", 7, seed=2)
    run = write_run(folder, checkpoints=str(folder / "elsewhere"))
    prior = dinr.load(run).prior
    assert prior is not None
    scale = Scale(launcher="none", engine="accelerate")
    engine = build_engine(prior.requires_grad_(), scale=scale, optim=Optim(), micro_batch_size=1, num_micro_batches=1)
    checkpoints = folder / "elsewhere" / "ddmi" / "tiny" / "prior"
    for samples in (2, 4, 8):
        path = str(checkpoints / f"{samples:012d}")
        checkpoint.commit(path, [checkpoint.write(path, checkpoint.collect(engine, state={"samples": samples}))])
    (damaged,) = (checkpoints / f"{2:012d}").glob("*.safetensors")
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (checkpoints / f"{12:012d}").mkdir()  # its writing was cut short
    counted: list[tuple[int, int]] = []
    dinr.evaluate(run, progress=lambda done, total, figures: counted.append((done, total)))
    assert counted[-1][0] == counted[-1][1] and [done for done, _ in counted] == sorted(done for done, _ in counted)
    assert counted[-2][0] == counted[-1][1]  # what was announced is what was done
    return run


def test_evaluation_measures_every_held_out_picture_in_posterior_mean(evaluated: Path):
    val = json.loads((evaluated / "evaluation.json").read_text())["val"]
    model = dinr.load(evaluated)
    assert model.experiment.data.val is not None
    split = Split(model, model.experiment.data.val)
    squared, fine = [], []
    for number in range(7):
        signal = split.dataset.signal(number)[0]
        fields = model.encode(split.one(number))
        squared.append((fields.render(16)[0] - (signal.inputs + 1) / 2).square().mean().item())
        assert signal.targets is not None
        fine.append((fields.render(32)[0] - signal.targets / 255).square().mean().item())
    assert val["signals"] == 7 and val["latent_numbers"] == 4 * 4 * 4
    assert val["psnr"] == pytest.approx(sum(-10 * math.log10(s) for s in squared) / 7, abs=1e-3)
    assert val["finer"]["psnr"] == pytest.approx(sum(-10 * math.log10(s) for s in fine) / 7, abs=1e-3)
    assert val["finer"].keys() == {"resolution", "psnr", "enlarged"} and val["finer"]["resolution"] == 32
    assert val["baselines"]["bicubic from 4 x 4 colours"]["psnr"] > val["psnr"]  # the model is not trained
    nearest = val["baselines"]["the nearest training picture"]
    assert (
        val["baselines"]["the mean of 13 training pictures"]["psnr"] < nearest["psnr"] + 6 and 0 < nearest["ssim"] < 1
    )


def test_the_mean_image_is_that_of_the_training_set(evaluated: Path):
    val = json.loads((evaluated / "evaluation.json").read_text())["val"]
    model = dinr.load(evaluated)
    assert model.experiment.data.val is not None
    train, held_out = (Split(model, url) for url in (model.experiment.data.train, model.experiment.data.val))
    mean = torch.stack([(train.dataset.signal(n)[0].inputs + 1) / 2 for n in range(13)]).mean(0)
    errors = [(held_out.dataset.signal(n)[0].inputs + 1) / 2 - mean for n in range(7)]
    expected = sum(-10 * math.log10(error.square().mean().item()) for error in errors) / 7
    assert val["baselines"]["the mean of 13 training pictures"]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_evaluation_measures_samples_and_each_kept_checkpoint(evaluated: Path):
    result = json.loads((evaluated / "evaluation.json").read_text())
    kid, course = (result["samples"][f"kid_efficientnet_lite0{suffix}"] for suffix in ("", "_by_checkpoint"))
    assert [entry["samples_seen"] for entry in course] == [4, 8]
    assert [entry["value"] for entry in course] == [pytest.approx(kid["value"], rel=1e-3)] * 2  # the same weights
    assert kid["samples"] == 8 and kid["training_signals"] == 13 and "EfficientNet-Lite0" in kid["network"]
    assert abs(kid["held_out_value"]) < kid["value"]
    assert result["samples"]["neighbours"]["median"] > result["samples"]["neighbours"]["smallest"] > 0
    assert list(result["left_out"]) == ["kid_efficientnet_lite0_by_checkpoint of 2", "fid, precision, recall"]
    assert "differs from the sha256" in result["left_out"]["kid_efficientnet_lite0_by_checkpoint of 2"]


def test_evaluation_writes_pictures_and_a_report_that_shows_them(evaluated: Path):
    names = ["reconstructions.png", "samples-16.png", "samples-64.png", "neighbours.png"]
    text = (evaluated / "report.md").read_text()
    for name in names:
        assert f"]({name})" in text
        with PillowImage.open(evaluated / name) as picture:
            assert min(picture.size) > 128
    assert "dB" in text and "evaluation.inception_weights is not set" in text


def test_training_pictures_are_their_own_nearest_neighbours_mirrored_or_not(tmp_path: Path):
    from distributed_inr.evaluation.splits import survey

    write_pictures(tmp_path / "train", 12, seed=1)
    model = dinr.load(write_run(tmp_path, data__val=None))
    training = Split(model, model.experiment.data.train)
    known = survey(training, lambda _: None)
    pictures = (torch.stack([training.dataset.signal(n)[0].inputs for n in (3, 11)]) + 1) / 2
    pictures[1] = pictures[1].flip(-1)
    distances, places = known.nearest(model.domain.thumbnails(pictures))
    assert places == [(3, 0), (11, 1)]
    assert distances.max() < 1e-3


def test_renderings_of_samples_are_let_go_while_others_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All of them may not fit the memory: 2048 clips of 16 frames of 256 px are 26 GB."""
    alive: set[int] = set()
    most = 0
    render = Image.render

    def watched(self: Image, *arguments, **options) -> torch.Tensor:
        nonlocal most
        rendered = render(self, *arguments, **options)
        number = len(alive) and max(alive) + 1
        alive.add(number)
        weakref.finalize(rendered, alive.discard, number)
        most = max(most, len(alive))
        return rendered

    monkeypatch.setattr(Image, "render", watched)
    write_pictures(tmp_path / "train", 6, seed=1)
    run = write_run(tmp_path, data__val=None, evaluation__num_samples=24, evaluation__batch_size=1, sampling__count=1)
    result = dinr.evaluate(run)
    assert result["samples"]["kid_efficientnet_lite0"]["samples"] == 24
    assert most <= SHOWN + 3  # what the sheets show, and the one that is measured


def test_held_out_signals_are_compared_in_the_same_number_as_samples(tmp_path: Path):
    for name, count in {"train": 6, "val": 7}.items():
        write_pictures(tmp_path / name, count, seed=count)
    run = write_run(tmp_path, evaluation__num_samples=3, sampling__count=6)
    counted: list[tuple[int, int]] = []
    found = dinr.evaluate(run, progress=lambda done, total, figures: counted.append((done, total)))["samples"]
    assert found["kid_efficientnet_lite0"]["samples"] == found["neighbours"]["held_out_signals"] == 3
    assert found["neighbours"]["samples"] == 6
    assert counted[-2][0] == counted[-1][1]


def test_what_cannot_be_measured_is_left_out_with_its_reason(tmp_path: Path):
    write_pictures(tmp_path / "train", 6, seed=1)
    run = write_run(tmp_path, data__val=None, evaluation__num_samples=0)
    result = dinr.evaluate(run, out=tmp_path / "out")
    assert "val" not in result and "data.val is not set" in result["left_out"]["val"]
    assert "evaluation.num_samples=0" in result["left_out"]["kid_efficientnet_lite0"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "neighbours.png",
        "report.md",
        "samples-16.png",
        "samples-64.png",
    ]
    assert not (run / "evaluation.json").exists()

    (run / "prior" / "model.safetensors").unlink()
    result = dinr.evaluate(run)
    assert "samples" not in result and "the prior is not trained" in result["left_out"]["samples"]


def test_inception_weights_that_are_not_such_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a file; give"):
        metrics.Inception(tmp_path / "none.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not a file of torch-fidelity's Inception weights"):
        metrics.Inception(tmp_path / "other.pth")


@pytest.mark.slow
def test_fid_precision_and_recall_are_measured_with_inception_weights_from_a_path(tmp_path: Path):
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):  # builds the network; there is nothing to load yet
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            pass

    torch.save({}, tmp_path / "empty.pth")
    torch.manual_seed(0)
    torch.save(Random("random", ["2048"], str(tmp_path / "empty.pth")).state_dict(), tmp_path / "random.pth")
    network = metrics.Inception(tmp_path / "random.pth")
    assert len(network.sha256) == 64

    pictures = torch.rand(6, 3, 16, 16)
    with torch.no_grad():
        features, other = network(pictures), network((pictures * 0.2).roll(1, 0))
    assert features.shape == (6, 2048)
    same = metrics.frechet_precision_recall(features, features)
    assert same["fid"] == pytest.approx(0, abs=1e-3) and same["precision"] == same["recall"] == 1
    assert metrics.frechet_precision_recall(features, other)["fid"] > 100 * abs(same["fid"])
