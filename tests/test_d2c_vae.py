"""D2C-VAE: interpolation, the three read-outs, the objective, and that fields are functions."""

import dataclasses
import math

import pytest
import torch

from distributed_inr import randomness
from distributed_inr.domains import Image, Signal
from distributed_inr.domains.domain import pixel_centres
from distributed_inr.models.d2c_vae import D2CVAE
from distributed_inr.models.encoders import PixelEncoder, TimmEncoder
from distributed_inr.models.planes import interpolate, plane_axes
from distributed_inr.models.torchvision_cpu import import_torchvision
from distributed_inr.presets.ddmi import PRESETS
from distributed_inr.randomness import sample_seed

DOMAIN = Image(size=16, source_size=32)
TINY = dict(
    encoder=PixelEncoder(channels=8, multipliers=(1, 2), num_blocks=1),
    latent_channels=2,
    decoder_channels=8,
    decoder_multipliers=(1, 2, 2),
    decoder_blocks=0,
    field_channels=4,
    readout_width=8,
    num_points=50,
)
CONDITIONINGS = ("single", "concatenate", "coarse-to-fine")


def batch(count: int, position: int = 0) -> Signal:
    generator = torch.Generator().manual_seed(0)
    return Signal(
        key=[str(i) for i in range(count)],
        seed=torch.tensor([sample_seed(0, i) for i in range(count)]),
        position=torch.full((count,), position),
        inputs=torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1,
        targets=torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
        text=[""] * count,
    )


def trained_like(model: torch.nn.Module) -> torch.nn.Module:
    """Leave the zero initialisation, under which parts of the model do nothing."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def test_a_constant_plane_interpolates_to_a_constant():
    planes = torch.full((2, 3, 5, 7), 1.5)
    torch.testing.assert_close(interpolate(planes, torch.rand(2, 11, 2) * 2 - 1), torch.full((2, 11, 3), 1.5))


def test_a_linear_plane_interpolates_linearly_between_cell_centres():
    x, y = pixel_centres(8), pixel_centres(4)
    planes = (2 * x[None, :] - 3 * y[:, None] + 1).expand(1, 1, 4, 8)
    coords = (torch.rand(1, 20, 2) * 2 - 1) * 0.75  # inside the outermost centres
    expected = 2 * coords[..., :1] - 3 * coords[..., 1:] + 1
    torch.testing.assert_close(interpolate(planes, coords), expected, atol=1e-6, rtol=1e-6)


def test_planes_are_the_coordinate_pairs():
    assert plane_axes(2) == [(0, 1)]
    assert plane_axes(3) == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_parameter_gets_a_gradient(conditioning):
    model = trained_like(D2CVAE(**TINY, conditioning=conditioning, kl_weight=0.1).build(DOMAIN))
    sum(model(batch(3)).values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_the_ablation_uses_one_or_all_scales_and_only_cfc_feeds_them_in_turn():
    widths = {}
    for conditioning in CONDITIONINGS:
        model = D2CVAE(**TINY, conditioning=conditioning).build(DOMAIN)
        fields = model.decode(torch.zeros(1, *model.latent_shape)).parameters
        widths[conditioning] = ([f.shape[-1] for f in fields], [b.first.in_features for b in model.readout.blocks])
    assert widths == {  # one more input for the scale wherever embeddings enter
        "single": ([32], [5, 8, 8, 8]),
        "concatenate": ([8, 16, 32], [13, 8, 8, 8]),
        "coarse-to-fine": ([8, 16, 32], [5, 13, 13, 8]),
    }


def test_a_coarse_to_fine_block_sees_no_finer_field_than_its_own():
    model = trained_like(D2CVAE(**TINY).build(DOMAIN))
    with torch.no_grad():
        field = model.decode(torch.randn(1, *model.latent_shape))
    seen = []
    for block in model.readout.blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    coords, view = torch.rand(1, 5, 2), torch.zeros(1, 5, 1)
    field(coords, view)
    field.parameters[2].add_(1.0)
    field(coords, view)
    first, second = seen[:4], seen[4:]
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.allclose(first[2], second[2])


def test_the_losses_are_eq_9_by_hand():
    model = trained_like(D2CVAE(**TINY, kl_weight=0.25, kl_start=1.0).build(DOMAIN))
    signal = batch(2)
    losses = model(signal)

    mean, deviation = model.posterior(DOMAIN.augment(signal))
    normal = torch.distributions.Normal
    divergence = torch.distributions.kl_divergence(normal(mean, deviation), normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(losses["kl"], 0.25 * divergence.mean())

    field = model.decode(mean + deviation * randomness.normal(signal.seed, "posterior", model.latent_shape))
    queries, values = DOMAIN.supervise(DOMAIN.augment(signal), 50)
    nll = 0.5 * (field(queries.coords, queries.view) - values).square().mean()
    torch.testing.assert_close(losses["reconstruction"], nll)


def test_the_kl_weight_rises_with_samples_seen():
    model = D2CVAE(**TINY, kl_weight=2.0, kl_start=0.5, kl_anneal_samples=100).build(DOMAIN)
    weights = [model._kl_weight(torch.tensor([p])).item() for p in (0, 50, 100, 1000)]
    assert weights == pytest.approx([1.0, 1.5, 2.0, 2.0])


def test_the_loss_of_a_batch_is_the_mean_over_its_parts():
    model = trained_like(D2CVAE(**TINY, kl_weight=0.1).build(DOMAIN))
    signal = batch(6)
    whole = model(signal)
    parts = [model(signal[i : i + 2]) for i in range(0, 6, 2)]
    for name in whole:
        torch.testing.assert_close(whole[name], sum(p[name] for p in parts) / 3, rtol=1e-5, atol=0)


def test_a_field_at_random_coordinates_equals_the_full_grid_chunked_or_not():
    model = trained_like(D2CVAE(**TINY).build(DOMAIN)).eval()
    with torch.no_grad():
        field = model.decode(torch.randn(2, *model.latent_shape))
        grid = field.render(40)
        torch.testing.assert_close(field.render(40, chunk_points=333), grid, atol=1e-6, rtol=0)
        x, y = torch.randint(0, 40, (2, 1000))
        coords = torch.stack([pixel_centres(40)[x], pixel_centres(40)[y]], dim=-1).expand(2, -1, -1)
        values = field(coords, torch.ones(2, 1000, 1))  # 40 pixels are finer than the finest scale, 2, whose log2 is 1
    expected = grid[:, :, y, x].transpose(1, 2)
    torch.testing.assert_close(values.add(1).mul(0.5).clamp(0, 1), expected, atol=1e-6, rtol=0)


def test_fields_are_deterministic_and_indexable():
    model = trained_like(D2CVAE(**TINY).build(DOMAIN))
    latent = torch.randn(3, *model.latent_shape)
    field, coords = model.decode(latent), torch.rand(3, 7, 2)
    view = torch.zeros(3, 7, 1)
    assert torch.equal(field(coords, view), field(coords, view))
    torch.testing.assert_close(field[1](coords[1:2], view[1:2]), field(coords, view)[1:2])
    torch.testing.assert_close(field[-1](coords[2:], view[2:]), field(coords, view)[2:])
    assert len(field) == 3 and len(field[0:2]) == 2


def test_one_picture_can_be_overfitted():
    torch.manual_seed(0)
    domain = Image(size=16, source_size=16, flip=False)
    model = D2CVAE(**{**TINY, "readout_width": 16, "num_points": 256}, kl_weight=0.0).build(domain)
    yy, xx = torch.meshgrid(pixel_centres(16), pixel_centres(16), indexing="ij")
    target = torch.stack([xx, yy, (3 * xx * yy).sin()])
    signal = Signal(
        key=["k"],
        seed=torch.tensor([1]),
        position=torch.tensor([0]),
        inputs=target[None],
        targets=((target[None] + 1) * 127.5).round().to(torch.uint8),
        text=[""],
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        sum(model(signal).values()).backward()
        optimizer.step()
    error = (model.decode(model.encode(signal)).render(16) - (target[None] + 1) / 2).square().mean().item()
    assert -10 * math.log10(error) > 30


def test_a_timm_backbone_is_an_encoder_and_wrong_ones_are_refused():
    encoder = TimmEncoder(model="resnet10t", reduction=8)
    model = D2CVAE(**{**TINY, "encoder": encoder}).build(DOMAIN)
    mean, deviation = model.posterior(batch(2))
    assert mean.shape == (2, 2, 2, 2) and (deviation > 0).all()
    with pytest.raises(ValueError, match="did you mean resnet18"):
        D2CVAE(**{**TINY, "encoder": TimmEncoder(model="resnet81")}).build(DOMAIN)
    with pytest.raises(ValueError, match="reduction=5 is not a stride of resnet10t; choose one of"):
        D2CVAE(**{**TINY, "encoder": TimmEncoder(model="resnet10t", reduction=5)}).build(Image(size=10, source_size=20))


def test_impossible_read_outs_are_refused():
    with pytest.raises(ValueError, match="readout_blocks=2 must be at least autoencoder.num_fields=3"):
        D2CVAE(readout_blocks=2)
    with pytest.raises(ValueError, match="num_fields=4 exceeds the 3 levels"):
        D2CVAE(num_fields=4)


@pytest.mark.parametrize(
    ("name", "autoencoder", "readout", "denoiser"),
    [("afhqv2-cat-256", 56.2, 0.7, 519.2), ("celebahq-256", 68.6, 0.7, 1015.0)],
)
def test_the_papers_sizes_are_as_their_presets_say(name, autoencoder, readout, denoiser):
    experiment = PRESETS[name]()
    with torch.device("meta"):
        model = experiment.autoencoder.build(experiment.domain)
        prior = experiment.prior.build(model.latent_shape)

    def millions(*modules: torch.nn.Module) -> float:
        return round(sum(p.numel() for m in modules for p in m.parameters()) / 1e6, 1)

    found = millions(model.encoder, model.decoder), millions(model.readout), millions(prior)
    assert found == (autoencoder, readout, denoiser)
    assert f"{autoencoder} M + {readout} M" in PRESETS[name].__doc__


def test_lpips_is_a_weighted_loss_on_whole_crops_with_weights_from_a_file(tmp_path):
    import_torchvision()
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    reference = _NoTrainLpips(net="squeeze", pnet_rand=True)
    features = {
        f"features.{index}.{name}": tensor
        for part in reference.net.slices
        for index, layer in part.named_children()
        for name, tensor in layer.state_dict().items()
    }
    path = str(tmp_path / "squeezenet.pth")
    torch.save(features, path)
    domain = Image(size=32, source_size=32)
    whole = {**TINY, "num_points": 32 * 32, "perceptual_network": "squeeze", "perceptual_checkpoint": path}
    model = trained_like(D2CVAE(**whole, perceptual_weight=2.0).build(domain))
    signal = dataclasses.replace(batch(2), inputs=torch.rand(2, 3, 32, 32) * 2 - 1)
    losses = model(signal)

    augmented = domain.augment(signal)
    mean, deviation = model.posterior(augmented)
    field = model.decode(mean + deviation * randomness.normal(signal.seed, "posterior", model.latent_shape))
    queries, values = domain.supervise(augmented, 32 * 32)
    pictures = [v.transpose(1, 2).unflatten(2, (32, 32)) for v in (field(queries.coords, queries.view), values)]
    torch.testing.assert_close(losses["perceptual"], 2 * reference(*pictures).mean())
    losses["perceptual"].backward()
    assert model.readout.out.weight.grad.abs().sum() > 0
    assert not any("slice" in name for name in model.state_dict())


def test_lpips_without_its_weights_or_whole_crops_is_refused(tmp_path):
    with pytest.raises(ValueError, match="perceptual_weight=1.0 needs autoencoder.perceptual_checkpoint"):
        D2CVAE(perceptual_weight=1.0)
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="num_points=50 must be at least domain.size"):
        D2CVAE(**TINY, perceptual_weight=1.0, perceptual_checkpoint=str(path)).build(DOMAIN)
    for file, words in ((path, "does not hold the features of vgg"), (tmp_path / "none.pth", "none.pth is not a file")):
        whole = D2CVAE(**{**TINY, "num_points": 256}, perceptual_weight=1.0, perceptual_checkpoint=str(file))
        with pytest.raises(ValueError, match=words):
            whole.build(DOMAIN)(batch(1))
