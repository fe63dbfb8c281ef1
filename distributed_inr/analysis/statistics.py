"""What latents are like: principal components, clusters, and correlation between layers (CHINR, sections 4.3.2 and C).

Layers are counted from 1, as in the paper. Statistics are taken in float64.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from distributed_inr.analysis.sources import MOST, hierarchical, training_latents, z_scores
from distributed_inr.generation import FieldModel

_ITERATIONS = 100


@dataclass(frozen=True)
class Components:
    """The two main directions of a set of points.

    Attributes:
        mean, directions: of the projection x -> (x - mean) directions.
        explained: the part of the variance along each, in [0, 1].
    """

    mean: Float64[Tensor, " dim"]
    directions: Float64[Tensor, "dim 2"]
    explained: Float64[Tensor, "2"]

    def project(self, points: Float[Tensor, "*count dim"]) -> Float64[Tensor, "*count 2"]:
        return (points.double() - self.mean) @ self.directions


def principal_components(points: Float[Tensor, "count dim"]) -> Components:
    """The first two principal components of at least two points; signs are such that each one's largest number is
    positive."""
    centred = points.double() - points.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)  # rising
    directions = vectors[:, -2:].flip(1)
    if directions.shape[1] == 1:  # points on a line
        directions = torch.cat([directions, torch.zeros_like(directions)], dim=1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    explained = (values.flip(0).clamp(min=0) / values.clamp(min=0).sum().clamp(min=1e-300))[:2]
    return Components(points.double().mean(0), directions * torch.where(largest < 0, -1.0, 1.0), explained)


# --- correlation between layers


@dataclass(frozen=True)
class Correlation:
    """Canonical correlation of two sets of numbers of the same signals.

    Attributes:
        mean: of the canonical coefficients, in [0, 1]: 1 where the smaller subspace is a linear map of the other.
        components: kept of each side; the coefficients are as many as the smaller.
        p_value: part of the permutations of one side whose mean is as large, theirs counted with the observed one.
        chance: mean over the permutations, what unrelated numbers of as many signals have.
    """

    mean: float
    components: tuple[int, int]
    p_value: float
    chance: float


@dataclass(frozen=True)
class Correlations:
    """Correlation between the layers' latents.

    Attributes:
        adjacent: of layers 1 and 2, 2 and 3, ...
        matrix: means between all pairs; [i, j] of layers i + 1 and j + 1.
    """

    adjacent: list[Correlation]
    matrix: Float64[Tensor, "layers layers"]
    signals: int
    variance: float
    permutations: int


def svcca(
    first: Float[Tensor, "count dim"],
    second: Float[Tensor, "count2 dim2"],
    *,
    variance: float = 0.99,
    permutations: int = 200,
    seed: int = 0,
) -> Correlation:
    """Singular vector canonical correlation of the rows of two matrices (Raghu et al., 2017; CHINR, section 4.3.2).

    Each side is centred and reduced to the fewest principal components with `variance` of its variance, but to a tenth
    of the signals at most: with more, chance alone correlates.

    Args:
        permutations: of the rows of one side, for the p-value, whose smallest value is 1 / (1 + permutations).
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} rows and {len(second)}: both sides must hold the same signals, in one order")
    return _correlation(_subspace(first, variance), _subspace(second, variance), permutations, seed)


def correlations(
    latents: Float[Tensor, "count layers dim"], *, variance: float = 0.99, permutations: int = 200, seed: int = 0
) -> Correlations:
    """`svcca` of adjacent layers with its p-value, and of all pairs without (CHINR, figures 7 and 17)."""
    spaces = [_subspace(points, variance) for points in latents.unbind(1)]
    adjacent = [_correlation(a, b, permutations, seed) for a, b in zip(spaces, spaces[1:], strict=False)]
    matrix = torch.tensor([[_mean_coefficient(a.T @ b) for b in spaces] for a in spaces], dtype=torch.float64)
    return Correlations(adjacent, matrix, len(latents), variance, permutations)


def _subspace(points: Tensor, variance: float) -> Float64[Tensor, "count components"]:
    """Orthonormal columns: the principal components that are kept, of unit length."""
    if not 0 < variance <= 1:
        raise ValueError(f"variance={variance} must lie in (0, 1]: the part of the variance that is kept; try 0.99")
    if len(points) < 20:
        raise ValueError(
            f"{len(points)} signals are too few to correlate layers by: a tenth of them are the components that may be "
            "kept; give 20 or more, better some hundreds"
        )
    points = points.double()
    vectors, scales, _ = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    squares = scales.square()
    needed = int((squares.cumsum(0) < variance * squares.sum() * (1 - 1e-12)).sum()) + 1
    varying = int((scales > 1e-9 * scales[0]).sum())  # none where the numbers are constant
    return vectors[:, : min(needed, varying, len(points) // 10)]


def _correlation(first: Tensor, second: Tensor, permutations: int, seed: int) -> Correlation:
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1; 200 or more give a p-value worth reading")
    generator = torch.Generator().manual_seed(seed)
    mean = _mean_coefficient(first.T @ second)
    orders = (torch.randperm(len(first), generator=generator) for _ in range(permutations))
    by_chance = torch.tensor([_mean_coefficient(first.T @ second[order]) for order in orders], dtype=torch.float64)
    p_value = (1 + int((by_chance >= mean).sum())) / (1 + permutations)
    return Correlation(mean, (first.shape[1], second.shape[1]), p_value, by_chance.mean().item())


def _mean_coefficient(between: Float64[Tensor, "components components2"]) -> float:
    """Mean singular value; 0 where one side does not vary."""
    if between.numel() == 0:
        return 0.0
    return min(1.0, torch.linalg.svdvals(between).mean().item())


# --- clusters


@dataclass(frozen=True)
class Clusters:
    """Points divided among the nearest of some centres.

    Attributes:
        labels: of each point, in 0..clusters - 1; clusters are numbered from the largest to the smallest.
        inertia: sum of squared distances to the centres.
    """

    labels: Int64[Tensor, " count"]
    centres: Float64[Tensor, "clusters dim"]
    inertia: float


def k_means(points: Float[Tensor, "count dim"], clusters: int, *, seed: int = 0, restarts: int = 8) -> Clusters:
    """Lloyd's algorithm from k-means++ centres (Arthur and Vassilvitskii, 2007), the best of some restarts."""
    if not 1 <= clusters <= len(points):
        raise ValueError(f"clusters={clusters} must lie in 1..{len(points)}, the number of points")
    points, generator = points.double(), torch.Generator().manual_seed(seed)
    return min((_lloyd(points, clusters, generator) for _ in range(restarts)), key=lambda found: found.inertia)


def _lloyd(points: Tensor, clusters: int, generator: torch.Generator) -> Clusters:
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < clusters:  # the next one is drawn by its squared distance to the nearest so far
        weights = torch.cdist(points, centres).min(1).values.square()
        if weights.sum() == 0:
            weights = torch.ones_like(weights)  # fewer distinct points than clusters
        centres = torch.cat([centres, points[torch.multinomial(weights, 1, generator=generator)]])
    labels = torch.full((len(points),), -1)
    for _ in range(_ITERATIONS):
        distances, nearest = torch.cdist(points, centres).min(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        counts = torch.bincount(labels, minlength=clusters)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
        for empty in (counts == 0).nonzero().flatten().tolist():  # goes to the point that is worst served
            farthest = int(distances.argmax())
            centres[empty], distances[farthest] = points[farthest], 0
    distances, labels = torch.cdist(points, centres).min(1)
    order = torch.bincount(labels, minlength=clusters).argsort(descending=True, stable=True)
    return Clusters(order.argsort()[labels], centres[order], distances.square().sum().item())


@dataclass(frozen=True)
class LayerClusters:
    """Clusters of one layer's latents, and how they agree with binary conditions.

    Attributes:
        layer: counted from 1.
        codes: [count, condition_bits] in {0, 1}: of each signal, the condition that layers 1 to `layer` give to the
            next; for the last layer, which gives none, the condition that it is drawn under.
        codes_of: the layer whose condition that is.
        points, explained: the latents along their two main components, and the part of the variance along each.
        purity: part of the signals that are in the commonest cluster of their code.
        chance_purity: the same for codes dealt out at random, mean of 20 deals; 1 where every signal has its own code.
        adjusted_rand: agreement of the two divisions of the signals; 1 is equal, 0 is chance (Hubert and Arabie, 1985).
        cluster_codes: the commonest value of each bit in each cluster.
        within, overall: mean number of bits that a cluster's members, and all signals, differ from it by.
        anchors: some signals, evenly spaced.
        nearest: of each anchor, the signals whose codes differ from its own in the fewest bits, nearest first.
    """

    layer: int
    clusters: Clusters
    codes: Float[Tensor, "count condition_bits"]
    codes_of: int
    points: Float64[Tensor, "count 2"]
    explained: Float64[Tensor, "2"]
    purity: float
    chance_purity: float
    adjusted_rand: float
    cluster_codes: Float[Tensor, "clusters condition_bits"]
    within: Float[Tensor, " clusters"]
    overall: Float[Tensor, " clusters"]
    anchors: Int64[Tensor, " anchors"]
    nearest: Int64[Tensor, "anchors neighbours"]


@torch.no_grad()
def clusters(
    model: FieldModel, *, count: int = 10, neighbours: int = 20, anchors: int = 3, most: int = MOST, seed: int = 0
) -> list[LayerClusters]:
    """k-means of the training latents layer by layer, z-scored, beside their binary conditions (CHINR, section C.2).

    Args:
        count: clusters of each layer.
        neighbours: signals with the nearest codes that are found for each of `anchors` signals.
        most: training latents used, evenly spaced.
    """
    prior = hierarchical(model, "clusters")
    latents = training_latents(model, most=most)
    if not 1 <= count <= len(latents):
        raise ValueError(f"count={count} must lie in 1..{len(latents)}, the training latents used; try 10")
    scores = z_scores(model, latents.values)
    bits = prior.bits(latents.values.to(model.device)).cpu()
    places = torch.linspace(0, len(latents) - 1, anchors + 2)[1:-1].round().long()
    found = []
    for layer in range(1, scores.shape[1] + 1):
        points, codes_of = scores[:, layer - 1], min(layer + 1, scores.shape[1])
        divided, codes, components = (
            k_means(points, count, seed=seed),
            bits[:, codes_of - 1],
            principal_components(points),
        )
        numbers = torch.unique(codes, dim=0, return_inverse=True)[1] if codes.shape[1] else divided.labels * 0
        generator = torch.Generator().manual_seed(seed)
        deals = [numbers[torch.randperm(len(numbers), generator=generator)] for _ in range(20)]
        members = torch.nn.functional.one_hot(divided.labels, count).to(codes)
        common = (members.T @ codes / members.sum(0)[:, None].clamp(min=1) > 0.5).to(codes)
        apart = (codes[:, None] - common).abs().sum(2)  # [count, clusters]
        between = (codes[places, None] - codes).abs().sum(2)  # [anchors, count]
        found.append(
            LayerClusters(
                layer=layer,
                clusters=divided,
                codes=codes,
                codes_of=codes_of,
                points=components.project(points),
                explained=components.explained,
                purity=purity(divided.labels, numbers),
                chance_purity=sum(purity(divided.labels, deal) for deal in deals) / len(deals),
                adjusted_rand=adjusted_rand(divided.labels, numbers),
                cluster_codes=common,
                within=(apart * members).sum(0) / members.sum(0).clamp(min=1),
                overall=apart.mean(0),
                anchors=places,
                nearest=between.argsort(dim=1, stable=True)[:, :neighbours],
            )
        )
    return found


def purity(labels: Int64[Tensor, " count"], groups: Int64[Tensor, " count"]) -> float:
    """Part of the points that have the commonest label of their group."""
    return _table(labels, groups).max(0).values.sum().item() / len(labels)


def adjusted_rand(first: Int64[Tensor, " count"], second: Int64[Tensor, " count"]) -> float:
    """The adjusted Rand index of two divisions: 1 where they are equal, 0 in the mean of unrelated ones."""

    def pairs(counts: Tensor) -> float:
        return (counts * (counts - 1) / 2).sum().item()

    table = _table(first, second)
    together, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected, most = rows * columns / math.comb(len(first), 2), (rows + columns) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def _table(first: Tensor, second: Tensor) -> Float64[Tensor, "first second"]:
    """How many points have each pair of labels."""
    rows, columns = int(first.max()) + 1, int(second.max()) + 1
    return torch.bincount(first * columns + second, minlength=rows * columns).view(rows, columns).double()
