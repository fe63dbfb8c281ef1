"""The counter-based generator: its distributions, and that a draw belongs to its sample."""

import torch

from distributed_inr import randomness

SEEDS = torch.tensor([randomness.sample_seed(0, position) for position in range(400)])


def test_a_draw_depends_on_its_own_seed_and_purpose_alone():
    whole = randomness.normal(SEEDS, "noise", (3, 5))
    assert torch.equal(whole[100:120], randomness.normal(SEEDS[100:120], "noise", (3, 5)))
    assert not torch.equal(whole, randomness.normal(SEEDS, "posterior", (3, 5)))
    assert torch.equal(randomness.uniform(SEEDS, "a", (7,))[:, :3], randomness.uniform(SEEDS, "a", (3,)))


def test_seeds_of_positions_differ_and_fit_int64():
    assert len(set(SEEDS.tolist())) == len(SEEDS)
    assert randomness.sample_seed(0, 1) != randomness.sample_seed(1, 0)
    assert 0 <= SEEDS.min() and SEEDS.max() < 2**63 - 1


def test_uniform_numbers_are_uniform_and_uncorrelated():
    numbers = randomness.uniform(SEEDS, "u", (500,)).double()
    assert 0 <= numbers.min() and numbers.max() < 1
    ordered = numbers.flatten().sort().values
    steps = torch.linspace(0, 1, len(ordered), dtype=torch.float64)
    assert (ordered - steps).abs().max() < 1.63 / len(ordered) ** 0.5  # Kolmogorov-Smirnov, 1 %
    along = torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[0, 1]
    across = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    assert abs(along) < 0.01 and abs(across) < 0.01


def test_normal_numbers_have_the_normal_distribution():
    numbers = randomness.normal(SEEDS, "n", (501,)).double()
    ordered = numbers.flatten().sort().values
    expected = 0.5 * (1 + torch.erf(ordered / 2**0.5))
    steps = torch.linspace(0, 1, len(ordered), dtype=torch.float64)
    assert (expected - steps).abs().max() < 1.63 / len(ordered) ** 0.5
    assert abs((numbers[:, :251] * numbers[:, 250:]).mean()) < 0.02  # the two halves of Box-Muller are uncorrelated


def test_integers_cover_their_range_evenly():
    counts = torch.bincount(randomness.integers(SEEDS, "i", (700,), 7).flatten(), minlength=7)
    expected = counts.sum() / 7
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # chi-squared with 6 degrees of freedom, 0.1 %
