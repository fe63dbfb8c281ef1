"""The image domain: reading, real pixels only, coordinates, rendering."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from distributed_inr.domains import Image, Queries, Signal, collate
from distributed_inr.domains.domain import pixel_centres
from distributed_inr.domains.image import downscale
from distributed_inr.field import Field
from distributed_inr.randomness import sample_seed

DOMAIN = Image(size=8, source_size=16)


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Picture.fromarray(pixels).save(file, form)
    return file.getvalue()


def signals(count: int, domain: Image = DOMAIN) -> Signal:
    generator = np.random.default_rng(0)
    side = domain.source_size
    records = [
        {
            "__key__": f"{i}",
            "png": encoded(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)),
            "txt": b"a chair",
        }
        for i in range(count)
    ]
    return collate([domain.read(record, sample_seed(0, i)) for i, record in enumerate(records)])


def picture_field(domain: Image, pixels: torch.Tensor) -> Field:
    """Fields that are the nearest pixels of real pictures."""

    def nearest(parameters: tuple[torch.Tensor, ...], coords: torch.Tensor, view: torch.Tensor | None) -> torch.Tensor:
        side = parameters[0].shape[-1]
        x, y = ((coords + 1) / 2 * side).long().clamp(0, side - 1).unbind(-1)
        return parameters[0].flatten(2).gather(2, (y * side + x)[:, None].expand(-1, 3, -1)).transpose(1, 2)

    return Field(nearest, (pixels,), domain)


def test_reading_gives_real_pixels_and_the_caption():
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    signal = DOMAIN.read({"__key__": "k", "png": encoded(pixels), "txt": "ein Stühlchen".encode()}, 7)
    assert signal.text == "ein Stühlchen" and int(signal.seed) == 7
    assert np.array_equal(signal.targets.permute(1, 2, 0).numpy(), pixels)
    assert signal.inputs.shape == (3, 8, 8) and signal.inputs.abs().max() <= 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"__key__": "k", "png": b"\x89PNG\r\n\x1a\ncut"}, "k.png: cannot be decoded"),
        (
            {"__key__": "k", "png": encoded(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))[:400]},
            "k.png: cannot be decoded",
        ),
        ({"__key__": "k", "json": b"{}"}, "k: no picture"),
        ({"__key__": "k", "png": encoded(np.zeros((16, 12, 3), np.uint8))}, "12 x 16 pixels, domain.source_size=16"),
    ],
)
def test_bad_records_are_refused_by_key(record, words):
    with pytest.raises(ValueError, match=words):
        DOMAIN.read(record, 0)


def test_pictures_above_the_pixel_limit_are_not_decoded():
    with pytest.raises(ValueError, match="above domain.max_pixels=100"):
        Image(size=8, source_size=16, max_pixels=100).read(
            {"__key__": "k", "png": encoded(np.zeros((16, 16, 3), np.uint8))}, 0
        )


def test_only_scales_that_the_source_has_are_trained_on():
    assert Image(size=64, source_size=128).resolutions == (64, 96, 128)
    assert Image(size=64, source_size=100).resolutions == (64, 96)
    assert Image(size=64, source_size=64).resolutions == (64,)
    with pytest.raises(ValueError, match="never invented"):
        Image(size=64, source_size=32)


@pytest.mark.parametrize("count", [20, 64])
def test_supervised_values_are_the_true_pixels_at_their_coordinates(count):
    batch = signals(60)
    queries, values = DOMAIN.supervise(batch, count)
    assert queries.coords.abs().max() < 1 and values.shape == (60, count, 3)
    seen = set()
    for i in range(60):
        resolution = round(8 * 2 ** float(queries.view[i, 0, 0]))
        seen.add(resolution)
        assert torch.equal(queries.view[i], queries.view[i, :1].expand(count, -1))
        pixels = downscale(batch.targets[i : i + 1], resolution)
        found = picture_field(DOMAIN, pixels)(queries.coords[i : i + 1])
        torch.testing.assert_close(found[0], values[i])
    assert seen == {8, 12, 16}


def test_scales_are_drawn_with_their_weights_and_crops_stay_inside():
    seeds = torch.tensor([sample_seed(1, i) for i in range(4000)])
    batch = signals(1).map(lambda tensor: tensor.expand(4000, *tensor.shape[1:]))
    batch = Signal(**{**vars(batch), "seed": seeds, "key": ["k"] * 4000, "text": [""] * 4000})
    queries, _ = DOMAIN.supervise(batch, 1)
    levels = torch.bincount((8 * 2 ** queries.view[:, 0, 0]).round().long())
    shares = torch.tensor([levels[8], levels[12], levels[16]]) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.3, 0.3, 0.4]), atol=0.03, rtol=0)


def test_supervision_does_not_depend_on_the_batch_around_a_sample():
    batch = signals(12)
    whole_queries, whole = DOMAIN.supervise(batch, 10)
    part_queries, part = DOMAIN.supervise(batch[4:7], 10)
    assert torch.equal(whole[4:7], part) and torch.equal(whole_queries.coords[4:7], part_queries.coords)


def test_augmentation_mirrors_inputs_and_targets_together_for_about_half_of_the_samples():
    batch = signals(200, Image(size=4, source_size=8))
    domain = Image(size=4, source_size=8)
    augmented = domain.augment(batch)
    mirrored = (augmented.inputs != batch.inputs).flatten(1).any(1)
    assert 70 < mirrored.sum() < 130
    assert torch.equal(augmented.targets[mirrored], batch.targets[mirrored].flip(-1))
    assert torch.equal(augmented.targets[~mirrored], batch.targets[~mirrored])
    assert torch.equal(Image(size=4, source_size=8, flip=False).augment(batch).inputs, batch.inputs)


def test_rendering_a_picture_at_its_own_resolution_gives_it_back_whatever_the_chunks():
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    field = picture_field(DOMAIN, pixels)
    torch.testing.assert_close(field.render(8), (pixels + 1) / 2)
    for chunk_points in (1, 5, 16, 70):
        assert torch.equal(field.render(8, chunk_points=chunk_points), field.render(8))
    torch.testing.assert_close(
        field[1].render(16), ((pixels[1:] + 1) / 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    )


def test_the_gaussian_and_laplace_likelihoods_are_their_closed_forms():
    observed, values = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 0.5]]])
    assert DOMAIN.nll(observed, values).item() == pytest.approx(0.5 * (1 + 0.25) / 2)
    assert Image(size=8, source_size=16, likelihood="laplace").nll(observed, values).item() == pytest.approx(0.75)


def test_pixel_centres_are_the_middles_of_equal_cells():
    assert pixel_centres(4).tolist() == [-0.75, -0.25, 0.25, 0.75]


def test_observing_an_image_is_evaluating_it():
    field = picture_field(DOMAIN, torch.rand(1, 3, 8, 8))
    coords = torch.rand(1, 9, 2) * 2 - 1
    assert torch.equal(DOMAIN.observe(field, Queries(coords)), field(coords))


@pytest.mark.parametrize("flip", [False, True])
def test_a_domain_says_how_many_copies_it_makes(flip):
    domain = Image(size=8, source_size=8, scales=(1.0,), scale_weights=(1.0,), flip=flip)
    signal = domain.signal(torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8), key="k")
    assert len(domain.copies(signal)) == domain.num_copies


def test_a_smaller_picture_of_ones_own_is_enlarged_with_a_line(caplog):
    domain = Image(size=8, source_size=8, scales=(1.0,), scale_weights=(1.0,))
    signal = domain.signal(torch.full((3, 4, 6), 255, dtype=torch.uint8), key="small.png")
    assert signal.inputs.shape == (1, 3, 8, 8) and signal.inputs.min() == 1
    assert [record.getMessage() for record in caplog.records] == [
        "small.png: 4 pixels enlarged to domain.size=8 for the encoder"
    ]


@pytest.mark.parametrize(("numbers", "side"), [(256, 9), (243, 9), (242, 8), (3, 1), (1, 1), (12288, 64), (99999, 64)])
def test_the_naive_picture_has_at_most_as_many_numbers(numbers: int, side: int):
    domain = Image(size=64, source_size=64)
    ramp = torch.linspace(0.2, 0.8, 64).expand(1, 3, 64, 64).contiguous()
    inputs = torch.cat([ramp, ramp]) * 2 - 1
    zero = torch.zeros(2, dtype=torch.int64)
    ((name, found),) = domain.naive(Signal(["a", "b"], zero, zero, inputs), numbers=numbers).items()
    assert name == f"bicubic from {side} x {side} colours" and found.shape == (2, 3, 64, 64)
    if side == 9:
        assert (found - ramp).square().mean().sqrt() < 10 ** (-35 / 20)


def test_a_naive_picture_flattens_what_is_finer_than_it():
    domain = Image(size=64, source_size=64)
    checks = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).float().expand(1, 3, 64, 64)
    zero = torch.zeros(1, dtype=torch.int64)
    (found,) = domain.naive(Signal(["a"], zero, zero, checks * 2 - 1), numbers=256).values()
    torch.testing.assert_close(found, torch.full_like(checks, 0.5), rtol=0, atol=0.02)
