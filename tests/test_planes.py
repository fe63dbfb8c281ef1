"""Planes of one size and of several: how they lie in a latent, and encoders that make them."""

import pytest
import torch

from distributed_inr.domains import Motion, Scene, Shape
from distributed_inr.models.d2c_vae import D2CVAE
from distributed_inr.models.encoders import ClipEncoder, PixelEncoder, PointEncoder
from distributed_inr.models.planes import Middle, PlaneAttention, PlaneLayout, interpolate, stack

LAYOUTS = [(8, 8), (8, 8, 8), (8, 8, 4)]


@pytest.mark.parametrize("cells", LAYOUTS)
def test_planes_survive_their_place_in_a_latent(cells: tuple[int, ...]):
    layout = PlaneLayout.of(5, cells)
    latent = torch.randn(3, *layout.latent_shape)
    stacks = layout.stacks(latent)
    assert torch.equal(layout.join(stacks, 3), latent)
    planes = layout.planes(stacks, 3)
    assert [tuple(plane.shape[1:]) for plane in planes] == [(5, *size) for size in layout.sizes]
    assert all(torch.equal(a, b) for a, b in zip(stack(planes), stacks, strict=True))
    assert torch.equal(torch.cat([p.flatten(1) for p in planes], 1).sort(1).values, latent.flatten(1).sort(1).values)


def test_a_plane_has_its_first_coordinate_along_its_width():
    layout = PlaneLayout.of(1, (8, 8, 4))
    assert layout.sizes == ((8, 8), (4, 8), (4, 8)) and layout.latent_shape == (1, 16, 8)
    assert not layout.is_stacked and PlaneLayout.of(2, (8, 8, 8)).latent_shape == (6, 8, 8)
    with pytest.raises(ValueError, match="planes of 8 x 6, 8 x 4, 6 x 4 cells do not fit on one canvas"):
        PlaneLayout.of(1, (8, 6, 4))


def test_attention_sees_all_planes_of_a_signal_and_no_other_signal():
    torch.manual_seed(0)
    middle = Middle(8)
    for module in middle.modules():
        if isinstance(module, PlaneAttention):
            torch.nn.init.normal_(module.out.weight)
    layout = PlaneLayout.of(8, (4, 4, 2))
    latent = torch.randn(2, *layout.latent_shape)
    other = latent.clone()
    other[0, :, -1, -1] += 1  # the last cell of the first signal's last plane
    before, after = (layout.planes(middle(layout.stacks(x), 2), 2) for x in (latent, other))
    for a, b in zip(before, after, strict=True):
        assert (a[0] - b[0]).abs().max() > 1e-4 and torch.equal(a[1], b[1])


def test_points_reach_the_cells_that_they_lie_in():
    """A feature of one point changes each plane at its own two coordinates, and nothing far from there."""
    torch.manual_seed(0)
    domain = Shape(size=16, num_points=3)
    encoder = PointEncoder(width=8, num_layers=2, channels=8, multipliers=(1,), num_blocks=1).build(domain, 4)
    place = torch.tensor([[[0.7, -0.2, 0.4], [-0.9, -0.9, -0.9], [-0.9, -0.9, -0.9]]])
    gone = place.clone()
    gone[0, 0] = -0.9
    with torch.no_grad():
        (with_it,), (without,) = (encoder.planes.stem(encoder_input(encoder, x)).split(3) for x in (place, gone))
    changed = (with_it - without).abs().amax(1)  # [planes, rows, columns]
    for plane, (a, b) in zip(changed, encoder.axes, strict=True):
        row, column = divmod(int(plane.flatten().argmax()), 16)
        near_column, near_row = (int((place[0, 0, axis] + 1) / 2 * 16) for axis in (a, b))
        assert abs(row - near_row) <= 1 and abs(column - near_column) <= 1


def encoder_input(encoder: torch.nn.Module, points: torch.Tensor) -> torch.Tensor:
    """What the convolutional part of the encoder is given."""
    seen = []
    handle = encoder.planes.stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(points)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("mixing", ["sum", "concatenate"])
def test_embeddings_are_read_from_the_right_planes(mixing: str):
    domain = Shape(size=16, num_points=10)
    model = D2CVAE(
        encoder=PointEncoder(width=8, num_layers=1, channels=8, multipliers=(1, 2), num_blocks=1),
        latent_channels=2,
        decoder_channels=8,
        decoder_multipliers=(1, 2),
        num_fields=2,
        field_channels=4,
        readout_width=8,
        readout_blocks=2,
        plane_mixing=mixing,
        num_points=10,
    ).build(domain)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        latent, coords = torch.randn(2, *model.latent_shape), torch.rand(2, 7, 3) * 2 - 1
        basis = model.basis(latent)
        embeddings = []
        for planes in basis:
            own = [interpolate(p, coords[..., pair]) for p, pair in zip(planes, ([0, 1], [0, 2], [1, 2]), strict=True)]
            embeddings.append(torch.cat(own, -1) if mixing == "concatenate" else own[0] + own[1] + own[2])
        torch.testing.assert_close(model.decode(latent)(coords), model.readout(embeddings, None))


def test_encoders_that_do_not_fit_a_domain_are_refused():
    with pytest.raises(ValueError, match="encoder.kind=clip reads clip, but the shape domain gives points"):
        D2CVAE(encoder=ClipEncoder()).build(Shape())
    with pytest.raises(ValueError, match="domain.size=30 must be a multiple of the encoder's reduction 4; try 28"):
        D2CVAE(encoder=PointEncoder()).build(Shape(size=30))
    with pytest.raises(ValueError, match="domain.cells=30 must be a multiple of the encoder's reduction 4; try 28"):
        D2CVAE(encoder=PointEncoder()).build(Scene(cells=30, size=30))
    with pytest.raises(ValueError, match="domain.pad=2 must be a multiple of the encoder's reduction 8; try 8"):
        D2CVAE(encoder=PixelEncoder(multipliers=(1, 2, 4, 4))).build(Motion(channels=66, pad=2))
    with pytest.raises(
        ValueError, match="encoder.dim=100 must be a multiple of autoencoder.encoder.head_dim=64; try 64"
    ):
        ClipEncoder(dim=100)
