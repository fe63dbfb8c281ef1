"""Analyses against closed forms: what they compute from tensors, without a run."""

import math

import pytest
import torch
from torch import Tensor

from distributed_inr import analysis
from distributed_inr.analysis.statistics import adjusted_rand, purity


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- SVCCA


def test_svcca_of_linearly_related_layers_is_one():
    x = normal(200, 6)
    rotation = torch.linalg.qr(normal(6, 6, seed=1))[0]
    found = analysis.svcca(x, 3 * x @ rotation + 5, permutations=99)
    assert found.mean == pytest.approx(1, abs=1e-6)
    assert found.components == (6, 6)
    assert found.p_value == 1 / 100
    assert found.chance < 0.4


def test_svcca_of_independent_layers_is_what_chance_gives():
    found = [analysis.svcca(normal(100, 8, seed=2 * i), normal(100, 8, seed=2 * i + 1), seed=i) for i in range(8)]
    assert all(one.p_value > 0.02 for one in found)
    assert 0.2 < sum(one.p_value for one in found) / 8 < 0.8
    assert all(abs(one.mean - one.chance) < 0.08 for one in found)
    assert analysis.svcca(normal(20, 8), normal(20, 8, seed=1)).components == (2, 2)  # a tenth of the signals


def test_svcca_is_the_mean_canonical_correlation_of_the_covariances():
    x = normal(300, 4)
    y = x[:, :3] @ normal(3, 3, seed=1) + 2 * normal(300, 3, seed=2)
    a, b = (points.double() - points.double().mean(0) for points in (x, y))
    roots = [torch.linalg.cholesky(torch.linalg.inv(side.T @ side)) for side in (a, b)]
    expected = torch.linalg.svdvals(roots[0].T @ a.T @ b @ roots[1]).mean().item()
    assert analysis.svcca(x, y, variance=1.0).mean == pytest.approx(expected, abs=1e-9)
    assert 0.2 < expected < 0.9


@pytest.mark.parametrize(("variance", "kept"), [(0.98, 1), (0.995, 2), (1.0, 3)])
def test_svcca_keeps_the_fewest_components_with_the_variance(variance: float, kept: int):
    columns = torch.linalg.qr(normal(100, 4) - normal(100, 4).mean(0))[0]  # orthogonal, nearly centred
    x = columns[:, :3] * torch.tensor([10.0, 1.0, 0.1])  # 100 / 101.01 = 0.990 of the variance is in the first
    assert analysis.svcca(x, x, variance=variance).components == (kept, kept)


def test_a_layer_that_never_varies_correlates_with_nothing():
    found = analysis.svcca(torch.full((50, 3), 2.0), normal(50, 3))
    assert (found.mean, found.p_value, found.components) == (0.0, 1.0, (0, 3))


def test_the_matrix_of_correlations_has_the_adjacent_layers_beside_its_diagonal():
    latents = normal(120, 3, 5, seed=3)
    latents[:, 1] = latents[:, 0] * 2 + 0.5 * latents[:, 1]
    found = analysis.correlations(latents, permutations=50)
    torch.testing.assert_close(found.matrix, found.matrix.T)
    torch.testing.assert_close(found.matrix.diagonal(), torch.ones(3, dtype=torch.float64))
    assert [one.mean for one in found.adjacent] == [found.matrix[0, 1].item(), found.matrix[1, 2].item()]
    assert found.adjacent[0] == analysis.svcca(latents[:, 0], latents[:, 1], permutations=50)
    assert found.adjacent[0].p_value < 0.05 < found.adjacent[1].p_value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": 1.5}, "variance=1.5 must lie in"),
        ({"permutations": 0}, "permutations=0 must be at least 1"),
    ],
)
def test_svcca_refuses_options_that_mean_nothing(options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        analysis.svcca(normal(50, 2), normal(50, 2, seed=1), **options)  # type: ignore[arg-type]


def test_svcca_refuses_few_signals_and_sides_of_different_ones():
    with pytest.raises(ValueError, match="19 signals are too few"):
        analysis.svcca(normal(19, 2), normal(19, 2))
    with pytest.raises(ValueError, match="50 rows and 40"):
        analysis.svcca(normal(50, 2), normal(40, 2))


# --- clusters and components


def test_k_means_finds_separate_blobs_the_largest_first():
    truth = torch.tensor([1] * 60 + [2] * 40 + [0] * 90)
    centres = torch.tensor([[0.0, 0.0, 0.0], [8.0, 0.0, 0.0], [0.0, 8.0, 8.0]])
    points = centres[truth] + 0.5 * normal(190, 3)
    found = analysis.k_means(points, 3)
    assert torch.equal(found.labels, truth)
    expected = torch.stack([points[truth == k].double().mean(0) for k in range(3)])
    torch.testing.assert_close(found.centres, expected)
    assert found.inertia == pytest.approx((points - expected[truth]).square().sum().item())
    again = analysis.k_means(points, 3)
    assert torch.equal(again.centres, found.centres) and torch.equal(again.labels, found.labels)


def test_k_means_with_as_many_clusters_as_points_or_fewer_distinct_ones():
    points = normal(7, 2)
    assert analysis.k_means(points, 7).inertia == pytest.approx(0, abs=1e-12)
    found = analysis.k_means(points[:2].repeat(5, 1), 4)
    assert found.inertia == pytest.approx(0, abs=1e-12) and len(found.centres) == 4
    with pytest.raises(ValueError, match=r"clusters=8 must lie in 1\.\.7"):
        analysis.k_means(points, 8)


def test_agreement_of_two_divisions_is_that_of_the_textbooks():
    first = torch.tensor([0, 0, 1, 1])
    assert adjusted_rand(first, torch.tensor([5, 5, 2, 2])) == 1
    assert adjusted_rand(first, torch.tensor([0, 0, 1, 2])) == pytest.approx(4 / 7)
    assert adjusted_rand(first, torch.tensor([0, 1, 0, 1])) == pytest.approx(-0.5)
    assert purity(first, torch.tensor([0, 0, 0, 1])) == 0.75
    assert purity(first, torch.arange(4)) == 1


def test_principal_components_are_the_directions_that_were_put_in():
    axes = torch.linalg.qr(normal(5, 5))[0]
    plain = torch.linalg.qr(normal(400, 3, seed=1) - normal(400, 3, seed=1).mean(0))[0] * 20
    points = plain * torch.tensor([3.0, 2.0, 1.0]) @ axes[:3] + 7
    found = analysis.principal_components(points)
    cosines = (found.directions.float().T @ axes[:2].T).abs()
    torch.testing.assert_close(cosines, torch.eye(2), rtol=0, atol=0.1)
    torch.testing.assert_close(found.explained, torch.tensor([9 / 14, 4 / 14]).double(), rtol=0.05, atol=0)
    projected = found.project(points)
    torch.testing.assert_close(projected.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (projected[:, 0] * projected[:, 1]).mean().abs() < 1e-9


def test_the_share_of_signals_alone_in_their_code_is_counted_by_signal():
    codes = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 1], [1, 1], [1, 0]]).float()
    assert analysis.share_alone(codes) == 2 / 6
    assert analysis.share_alone(torch.zeros(5, 0)) == 0


# --- spectra


@pytest.mark.parametrize("wave", [(5, 0), (0, 5), (3, 4), (-3, 4)])
def test_a_sinusoids_spectrum_peaks_at_its_frequency(wave: tuple[int, int]):
    places = torch.arange(32) / 32
    plane = torch.cos(2 * math.pi * (wave[0] * places + wave[1] * places[:, None]) + 0.3)
    power = analysis.radial_power(plane[None] + 4)
    assert power.argmax() == 5
    assert power[4:7].sum() > 0.98 * power.sum()
    assert power.sum().item() == pytest.approx(0.5, rel=1e-3)  # mean square of a sinusoid
    assert power[0] < 1e-12


def test_white_noise_keeps_its_power_and_a_flat_plane_has_none():
    power = analysis.radial_power(2 * normal(400, 16, 16))
    assert power.sum().item() == pytest.approx(4, rel=0.03)
    assert analysis.radial_power(torch.full((1, 8, 8), 3.0)).sum() < 1e-10


def test_a_jump_from_edge_to_edge_is_no_high_frequency():
    ramp = torch.linspace(-1, 1, 32).expand(1, 32, 32)
    power = analysis.radial_power(ramp)
    assert power[6:].sum() < 1e-3 * power.sum()


# --- control


def test_composition_exchanges_exactly_one_layer():
    latents = normal(3, 4, 5)
    found = analysis.composition(latents, layers=[1, 3])
    assert found.shape == (2, 3, 4, 5)
    for row, layer in enumerate([1, 3]):
        for signal in range(3):
            assert torch.equal(found[row, signal, layer - 1], latents[signal, layer - 1])
            others = [i for i in range(4) if i != layer - 1]
            assert torch.equal(found[row, signal, others], latents[0, others])
    assert torch.equal(analysis.composition(latents)[[0, 2]], found)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 3)])
def test_interpolation_has_its_four_signals_at_the_corners_and_their_mean_in_the_middle(shape: tuple[int, ...]):
    corners = normal(4, *shape)
    found = analysis.interpolation(corners, count=5)
    assert torch.equal(found[[0, 0, -1, -1], [0, -1, 0, -1]], corners)
    torch.testing.assert_close(found[2, 2], corners.mean(0))
    torch.testing.assert_close(found[1, 0], 0.75 * corners[0] + 0.25 * corners[2])
    torch.testing.assert_close(found[0, 1], 0.75 * corners[0] + 0.25 * corners[1])


def test_layerwise_interpolation_moves_one_layer_and_holds_the_others():
    start, end = normal(2, 3, 5)
    found = analysis.layerwise(start, end, count=4)
    assert found.shape == (3, 4, 3, 5)
    for layer in range(3):
        others = [i for i in range(3) if i != layer]
        assert torch.equal(found[layer][:, others], start[others].expand(4, -1, -1))
        assert torch.equal(found[layer, 0, layer], start[layer]) and torch.equal(found[layer, -1, layer], end[layer])
        torch.testing.assert_close(found[layer, 1, layer], (2 * start[layer] + end[layer]) / 3)


def test_layers_and_counts_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match=r"layer=5 must lie in 1\.\.4"):
        analysis.composition(normal(2, 4, 5), layers=[5])
    with pytest.raises(ValueError, match=r"layer=0 must lie in 1\.\.3"):
        analysis.layerwise(normal(3, 5), normal(3, 5), layers=[0])
    with pytest.raises(ValueError, match="count=1 must be at least 2"):
        analysis.interpolation(normal(4, 3, 5), count=1)
