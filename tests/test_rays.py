"""Rays and volume rendering against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from distributed_inr.domains import rays


def unit(*numbers: float) -> Tensor:
    vector = torch.tensor(numbers, dtype=torch.float64)
    return vector / vector.norm()


def camera(rows: list[list[float]], focal: float = 1.0, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    pose = torch.tensor([*rows, [0.0, 0.0, 0.0, 1.0]]).flatten()
    return torch.cat([pose, torch.tensor([focal, focal, *centre])])


# Cameras


def test_opengl_axes_x_right_y_up_looking_along_minus_z():
    own = camera([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], focal=0.5)
    origins, directions = rays.camera_rays(own.expand(3, -1), torch.tensor([[0.5, 0.5], [1.0, 0.5], [0.5, 0.0]]))
    assert torch.equal(origins, torch.zeros(3, 3))
    half = math.sqrt(0.5)
    torch.testing.assert_close(directions, torch.tensor([[0.0, 0.0, -1.0], [half, 0.0, -half], [0.0, half, -half]]))


def test_the_principal_point_looks_straight_ahead():
    own = camera([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 1.0, 3.0]], centre=(0.3, 0.8))
    origin, direction = rays.camera_rays(own, torch.tensor([0.3, 0.8]))
    assert torch.equal(origin, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(direction, torch.tensor([0.0, 0.0, -1.0]))


def test_pixels_are_numbered_view_by_view_and_row_by_row():
    turned = camera([[0.0, 0.0, 1.0, 4.0], [0.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    both = torch.stack([camera([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]), turned])
    origins, directions = rays.pixel_rays(both[None], torch.tensor([[1, 2, 7]]), 2)
    places = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    expected = rays.camera_rays(both[[0, 0, 1]], places)
    assert torch.equal(origins[0], expected[0]) and torch.equal(directions[0], expected[1])


def test_orbits_look_at_the_origin_with_z_up():
    cameras = rays.orbit(8, elevation=30.0, radius=2.0, angle=0.9)
    origins, directions = rays.camera_rays(cameras, torch.full((8, 2), 0.5))
    torch.testing.assert_close(origins + 2 * directions, torch.zeros(8, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(origins[:, 2], torch.ones(8))
    torch.testing.assert_close(origins[0], torch.tensor([0.0, -math.sqrt(3), 1.0]))
    assert origins[1, 0] > 1  # counter-clockwise from above: from -y to +x
    pose = cameras[:, :16].view(8, 4, 4)[:, :3, :3]
    torch.testing.assert_close(pose.transpose(1, 2) @ pose, torch.eye(3).expand(8, -1, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(pose), torch.ones(8))
    _, upper = rays.camera_rays(cameras, torch.tensor([[0.5, 0.0]]).expand(8, -1))
    assert (upper[:, 2] > directions[:, 2]).all()  # the upper border shows what is higher
    edge = rays.camera_rays(cameras[:1], torch.tensor([[1.0, 0.5]]))[1]
    torch.testing.assert_close((edge * directions[:1]).sum(-1).arccos(), torch.tensor([0.45]), atol=1e-5, rtol=0)


# Bounds


def test_rays_through_the_sphere():
    origins = torch.tensor([[0.0, -3.0, 0.0], [0.5, -3.0, 0.0], [1.5, -3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    directions = torch.tensor([[0.0, 1.0, 0.0]]).expand(5, -1)
    near, far = rays.interval(origins, directions, "sphere")
    half = math.sqrt(0.75)
    torch.testing.assert_close(near, torch.tensor([2.0, 3 - half, 3.0, 0.0, 0.0]))
    torch.testing.assert_close(far, torch.tensor([4.0, 3 + half, 3.0, 1.0, 0.0]))


@pytest.mark.parametrize("bounds", ["sphere", "box"])
def test_intervals_are_where_points_enter_and_leave(bounds: rays.Bounds):
    generator = torch.Generator().manual_seed(0)
    origins = torch.randn(500, 3, generator=generator, dtype=torch.float64) * 1.5
    directions = torch.nn.functional.normalize(torch.randn(500, 3, generator=generator, dtype=torch.float64), dim=-1)
    directions[:20] = torch.eye(3, dtype=torch.float64)[torch.arange(20) % 3]  # along axes
    near, far = rays.interval(origins, directions, bounds)
    depths = torch.linspace(0, 8, 16001, dtype=torch.float64)
    points = origins[:, None] + directions[:, None] * depths[:, None]
    inside = points.norm(dim=-1) < 1 if bounds == "sphere" else (points.abs() < 1).all(-1)
    torch.testing.assert_close(inside.sum(1).double() * 5e-4, far - near, atol=1.1e-3, rtol=0)
    hit = inside.any(1)
    assert 50 < hit.sum() < 500
    first = depths[inside.float().argmax(1)]
    torch.testing.assert_close(first[hit], near[hit], atol=6e-4, rtol=0)


def test_depths_lie_in_their_steps_and_rays_that_miss_have_none():
    near, far = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    within = torch.tensor([[0.0, 0.25, 0.5, 0.999]]).expand(2, -1)
    depths = rays.depths_between(near, far, within)
    torch.testing.assert_close(depths, torch.tensor([[1.0, 1.625, 2.25, 2.9995], [2.0] * 4]))
    torch.testing.assert_close(rays.middles(near, far, 4)[0], torch.tensor([1.25, 1.75, 2.25, 2.75]))


# Volume rendering


@pytest.mark.parametrize("density", [0.0, 5e-5, 0.3, 2.0, 40.0])
@pytest.mark.parametrize("steps", [1, 7, 64])
def test_constant_density_has_its_closed_form(density: float, steps: int):
    near, length = 1.2, 1.7
    own = torch.full((1, steps), density)
    step = torch.tensor([length / steps])
    colour, ground = torch.tensor([0.2, 0.5, 0.9]), 1.0
    opacity = 1 - math.exp(-density * length)
    found = rays.composite(own, colour.expand(1, steps, 3), step, ground)
    torch.testing.assert_close(found[0], opacity * colour + (1 - opacity) * ground, atol=1e-5, rtol=0)

    places = torch.arange(steps + 1) * (length / steps)
    torch.testing.assert_close(rays.transmittance(own, step)[0], (-density * places).exp(), atol=1e-5, rtol=0)

    expected = near + (length if density == 0 else (1 - math.exp(-density * length)) / density)
    found = rays.expected_depth(own, torch.tensor([near]), step)
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-5, rtol=0)


def test_gradients_of_constant_density_have_their_closed_form():
    """C = (1 - e^-sL) c + e^-sL g, so dC/ds = L e^-sL (c - g) over all steps, and depth = (1 - e^-sL) / s."""
    density, length, steps = torch.tensor(1.3, requires_grad=True), 1.7, 16
    colour = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    step = torch.tensor([length / steps])
    seen = rays.composite(density.expand(1, steps), colour.expand(1, steps, 3), step, 1.0)[0]
    through = math.exp(-1.3 * length)
    for channel in range(3):
        by_density, by_colour = torch.autograd.grad(seen[channel], [density, colour], retain_graph=True)
        expected = length * through * (colour[channel].detach() - 1)
        torch.testing.assert_close(by_density, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(by_colour[channel], torch.tensor(1 - through), atol=1e-5, rtol=0)
    depth = rays.expected_depth(density.expand(1, steps), torch.tensor([0.0]), step)
    (slope,) = torch.autograd.grad(depth.sum(), [density])
    expected = length * through / 1.3 - (1 - through) / 1.3**2
    torch.testing.assert_close(slope, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_wall_hides_what_is_behind_it():
    density = torch.tensor([[0.0, 0.0, 1e4, 3.0]])
    colours = torch.eye(4, 3)[None]
    near, step = torch.tensor([2.0]), torch.tensor([0.5])
    torch.testing.assert_close(rays.composite(density, colours, step, 0.0)[0], colours[0, 2])
    depth = rays.expected_depth(density, near, step)
    torch.testing.assert_close(depth, torch.tensor([3.0]), atol=1e-3, rtol=0)
    empty = rays.composite(density, colours, torch.tensor([0.0]), 1.0)  # a ray that misses the bounds
    assert torch.equal(empty, torch.ones(1, 3))


def test_rendering_converges_to_the_integral():
    """A density of 4 t from 0 to 1: the transmittance is e^(-2 t^2)."""
    errors = []
    for steps in (8, 64):
        depths = rays.middles(torch.zeros(1), torch.ones(1), steps)
        colours = torch.ones(1, steps, 3)
        seen = rays.composite(4 * depths, colours, torch.tensor([1 / steps]), 0.0)[0, 0]
        errors.append(abs(float(seen) - (1 - math.exp(-2))))
    assert errors[1] < 1e-5 and errors[0] < 1e-3


def test_rendering_can_be_differentiated_twice():
    generator = torch.Generator().manual_seed(0)
    density = torch.rand(2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    colours = torch.rand(2, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    step = torch.tensor([0.3, 0.0], dtype=torch.float64)

    def seen(density: Tensor, colours: Tensor) -> Tensor:
        return rays.composite(density, colours, step, 1.0)

    assert torch.autograd.gradcheck(seen, (density, colours))
    assert torch.autograd.gradgradcheck(seen, (density, colours))
    assert torch.autograd.gradcheck(lambda d: rays.expected_depth(d, torch.zeros_like(step), step), (density,))
