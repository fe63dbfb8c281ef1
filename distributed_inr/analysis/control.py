"""Control over what is made: layers of latents held, exchanged and blended (CHINR, sections 4.2, 4.3.1 and C.1.1).

Layers are counted from 1, as in the paper.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distributed_inr.analysis.sources import check_layers, hierarchical
from distributed_inr.generation import FieldModel
from distributed_inr.models.noising import Sampler
from distributed_inr.randomness import sample_seed

MAX_LEAVES = 256
"""Of a tree: its picture has a row for each."""


@dataclass(frozen=True)
class Node:
    """Latents of the first layers, and one completion of them.

    Attributes:
        path: which child, from the root down; () is the root.
        seed: of its draw: `sample_seed(parent's seed, index among the children)`.
        fixed: how many first layers are the node's own; they are held in all that lies below it.
        latent: [layers, dim], the node's layers and then their completion with the node's own seed.
        bits: [layers, condition_bits], the conditions c^1 ... c^L in {0, 1} that the latent gives.
    """

    path: tuple[int, ...]
    seed: int
    fixed: int
    latent: Float[Tensor, "layers dim"]
    bits: Float[Tensor, "layers condition_bits"]


@dataclass(frozen=True)
class Tree:
    """A tree of draws, and how they were made.

    Attributes:
        levels: layers that a node of each depth holds; (0, 1, 2) is the root, which holds none, and two generations.
        nodes: parents before children, and children in order.
    """

    seed: int
    levels: tuple[int, ...]
    branches: int
    sampler: Sampler
    steps: int
    nodes: dict[tuple[int, ...], Node]

    def children(self, path: tuple[int, ...]) -> list[Node]:
        return [node for node in self.nodes.values() if node.path and node.path[:-1] == path]


@torch.no_grad()
def tree(
    model: FieldModel,
    *,
    fix_layers: Sequence[int] | None = None,
    branches: int = 2,
    seed: int = 0,
    sampler: Sampler | None = None,
    steps: int | None = None,
) -> Tree:
    """Hold the first layers and vary the others (CHINR, section 4.2).

    The root is drawn with `seed` itself, and its children are the first samples of `model.sample(seed=seed)`. A child
    has its parent's layers exactly, draws the next ones under them, and is completed with its own seed. Nodes are drawn
    one at a time, so that each can be drawn again to the bit: a matrix product rounds by how many rows it has.

    Args:
        fix_layers: rising numbers of first layers that the generations hold; None takes 1, 2, 3, as far as a layer is
            left to vary.
        branches: children of a node.
        sampler, steps: None takes the run's own.
    """
    prior = hierarchical(model, "tree")
    layers = prior.latent_shape[0]
    fix_layers = range(1, min(3, layers - 1) + 1) if fix_layers is None else fix_layers
    levels = (0, *check_layers(fix_layers, layers))
    if list(levels) != sorted(set(levels)) or len(levels) < 2:
        raise ValueError(f"fix_layers={list(levels[1:])} must be one or more rising numbers of layers; try 1 2 3")
    if branches < 1 or branches ** (len(levels) - 1) > MAX_LEAVES:
        raise ValueError(
            f"branches={branches} over {len(levels) - 1} generations make {max(branches, 0) ** (len(levels) - 1)} "
            f"leaves, and 1..{MAX_LEAVES} fit a picture; give other branches or fewer fix_layers"
        )
    sampling = model.experiment.sampling
    steps = sampling.steps if steps is None else steps
    made = Tree(seed, levels, branches, sampler or sampling.sampler, steps, {})
    paths: list[tuple[int, ...]] = [()]
    for path in paths:  # which grows by a generation after the other
        node_seed, held = seed, prior.latent_mean[:0]
        if path:
            parent = made.nodes[path[:-1]]
            node_seed, held = sample_seed(parent.seed, path[-1]), parent.latent[: parent.fixed]
        latent = _complete(model, made, node_seed, held)
        bits = prior.bits(latent[None])[0].cpu()
        made.nodes[path] = Node(path, node_seed, levels[len(path)], latent.cpu(), bits)
        if len(path) < len(levels) - 1:
            paths += [(*path, index) for index in range(branches)]
    return made


@torch.no_grad()
def redraw(model: FieldModel, made: Tree, path: tuple[int, ...]) -> Float[Tensor, "layers dim"]:
    """One node's latent again, from the tree's seed and the node's path alone."""
    prior, seed = hierarchical(model, "tree"), made.seed
    latent = _complete(model, made, seed, prior.latent_mean[:0])
    for depth, index in enumerate(path):
        seed = sample_seed(seed, index)
        latent = _complete(model, made, seed, latent[: made.levels[depth]])
    return latent.cpu()


def composition(
    latents: Float[Tensor, "signals layers dim"], *, layers: Sequence[int] | None = None
) -> Float[Tensor, "rows signals layers dim"]:
    """The first signal with one layer of each signal: a row for each of `layers` (CHINR, section 4.3.1).

    The first column is the first signal itself. Composing leaves the chain of conditions: layers may not fit.

    Args:
        layers: counted from 1; None is all.
    """
    rows = []
    for layer in check_layers(layers, latents.shape[1]):
        row = latents[:1].repeat(len(latents), 1, 1)
        row[:, layer - 1] = latents[:, layer - 1]
        rows.append(row)
    return torch.stack(rows)


def interpolation(
    corners: Float[Tensor, "4 *latent_shape"], *, count: int = 7
) -> Float[Tensor, "rows columns *latent_shape"]:
    """Latents between four, bilinearly: complete interpolation (CHINR, section C.1.1). For latents of any shape.

    Args:
        corners: top left, top right, bottom left, bottom right; the grid's corners are these exactly.
        count: rows and columns, 2 or more.
    """
    top, bottom = (torch.stack([left, right]) for left, right in (corners[:2], corners[2:]))
    rows = [_between(top, bottom, part) for part in _parts(count)]
    return torch.stack([torch.stack([_between(left, right, part) for part in _parts(count)]) for left, right in rows])


def layerwise(
    start: Float[Tensor, "layers dim"],
    end: Float[Tensor, "layers dim"],
    *,
    count: int = 7,
    layers: Sequence[int] | None = None,
) -> Float[Tensor, "rows columns layers dim"]:
    """From `start` to `end` in one layer alone, a row for each of `layers` (CHINR, section C.1.1).

    Args:
        count: columns, both ends included.
        layers: counted from 1; None is all.
    """
    rows = []
    for layer in check_layers(layers, len(start)):
        row = start.repeat(count, 1, 1)
        parts = _parts(count)
        row[:, layer - 1] = torch.stack([_between(start[layer - 1], end[layer - 1], part) for part in parts])
        rows.append(row)
    return torch.stack(rows)


def _complete(model: FieldModel, made: Tree, seed: int, held: Tensor) -> Float[Tensor, "layers dim"]:
    """Latents whose first layers are `held`, and whose others are drawn with one seed."""
    prior, how = hierarchical(model, "tree"), model.sampling_settings(made.steps, made.sampler)
    return prior.sample(torch.tensor([seed]), prefix=held[None], **how)[0]


def _parts(count: int) -> Iterator[float]:
    if count < 2:
        raise ValueError(f"count={count} must be at least 2: the ends of an interpolation; try 7")
    return (index / (count - 1) for index in range(count))


def _between(start: Tensor, end: Tensor, part: float) -> Tensor:
    """Exactly `start` at 0 and exactly `end` at 1."""
    return start * (1 - part) + end * part
