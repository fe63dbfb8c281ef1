"""Shapes: functions of space to occupancy, measured at points."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distributed_inr import randomness
from distributed_inr.config import config, override
from distributed_inr.domains.domain import Domain, Queries, Record, Signal, caption, evaluate_grid, pixel_centres
from distributed_inr.domains.image import to_pillow
from distributed_inr.field import Field
from distributed_inr.raw import meshes
from distributed_inr.raw.arrays import read_rows

_THUMBNAIL = 16
"""Cells a side at which shapes are compared with training shapes."""
_PICTURE = (64, 192)
"""Least and most pixels a side of a shape's picture."""
_LIGHT = (0.35, 0.8, 0.5)
"""Direction to the light: right, up, to the eye."""
_AZIMUTH, _ELEVATION = math.radians(35), math.radians(25)
_TURNTABLE = 8


@config
class Shape(Domain):
    """Solids in [-1, 1]^3: a value is the logit, or the mean, of being inside; the encoder sees points on the surface.

    Records hold a grid of cells, or queried points with their occupancy; and surface points.
    """

    kind: Literal["shape"] = "shape"
    size: Annotated[int, pydantic.Field(gt=0)] = 32
    """Cells a side of the grids in the shards, of renderings, and of the planes that surface points are pooled into."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """Of a point's occupancy: bernoulli takes values as logits; gaussian, at unit scale, as the occupancy itself."""
    num_points: Annotated[int, pydantic.Field(gt=0)] = 2048
    """Surface points that the encoder sees, drawn anew for every sample from those stored."""
    point_noise: Annotated[float, pydantic.Field(ge=0)] = 0.005
    """Deviation of the noise on them, in units of half the cube's side."""
    fit_points: Annotated[int, pydantic.Field(gt=0)] = 8192
    """Measurements that a latent is fitted to where an encoder is an optimisation: drawn as in training, but the same
    for all shapes of a set; all cells where as many are asked for and `near` is 0."""
    near: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    """Share of a grid's measurements that is drawn from cells with a neighbour of the other kind; the others are drawn
    from all cells. Above 0, the likelihood weighs surfaces more than the published one."""
    up: Literal["y", "z"] = "y"
    """Axis that points up in pictures."""
    fill: Annotated[float | None, pydantic.Field(gt=0, le=1)] = None
    """Of one's own meshes, half the longest side, where the cube's is 1; none: as the training set's, else 7/8."""
    close: Annotated[float | None, pydantic.Field(ge=0, allow_inf_nan=False)] = None
    """Radius, in cells, of the openings of one's own meshes that are closed; none: as the training set's, else 1."""
    queries: Annotated[int | None, pydantic.Field(gt=0)] = None
    """Queried points of each shape in the shards, where they hold such; none: as the training set says, else any."""

    coord_dim: ClassVar[int] = 3
    value_dim: ClassVar[int] = 1
    view_dim: ClassVar[int] = 0
    value_span: ClassVar[float] = 1.0
    input_kind: ClassVar[str] = "points"
    input_dim: ClassVar[int] = 3
    metrics: ClassVar[tuple[str, ...]] = ("iou", "accuracy")
    noun: ClassVar[str] = "shape"
    suffixes: ClassVar[tuple[str, ...]] = (".glb", ".ply", ".obj", ".off", ".stl", ".png", ".gif", ".npz")
    unit: ClassVar[str] = "cells"
    fine: ClassVar[int] = 4
    max_resolution: ClassVar[int] = 1024  # 4.3 GB in memory

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.size, self.size, self.size

    def read(self, record: Record, seed: int) -> Signal:
        key = record["__key__"]
        try:
            surface, targets = read_rows(record["surface.npy"], 3), _targets(record, self.size, self.queries)
        except KeyError as error:
            raise ValueError(f"{key}: no {error.args[0]}; prepare the set as shapes") from None
        except ValueError as error:
            raise ValueError(f"{key}: cannot be decoded: {error}") from None
        return self._signal(torch.from_numpy(surface), targets, seed, key, caption(record))

    def _signal(self, surface: Tensor, targets: Tensor, seed: int, key: str, text: str = "") -> Signal:
        seeds = torch.tensor([seed])
        chosen = randomness.integers(seeds, "surface points", (self.num_points,), len(surface))[0]
        noise = randomness.normal(seeds, "surface noise", (self.num_points, 3))[0]
        return Signal(
            key=key,
            seed=seeds[0],
            position=torch.tensor(0),
            inputs=surface[chosen] + self.point_noise * noise,
            targets=targets,
            text=text,
        )

    def open(self, path: Path) -> Signal:
        """A mesh file, closed or not, treated as `prepare_data.py shape` treated those of the training set."""
        fill = meshes.Form.fill if self.fill is None else self.fill
        close = meshes.Form.close if self.close is None else self.close
        try:
            mesh = meshes.normalised(meshes.read_mesh(path), fill=fill)
            occupied = meshes.solid(mesh, self.size, close=close)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; give the path of a file") from None
        except ValueError as error:
            raise ValueError(
                f"{path} is not a usable mesh: {error}; {', '.join(meshes.MESH_SUFFIXES)} are read"
            ) from None
        surface = torch.from_numpy(meshes.surface_points(mesh, self.num_points).astype(np.float32))
        single = self._signal(surface, torch.from_numpy(occupied.astype(np.uint8)), 0, path.name)
        batch = single.map(lambda tensor: tensor[None])
        return Signal([path.name], batch.seed, batch.position, batch.inputs, batch.targets, [""])

    def blank(self, count: int) -> tuple[Tensor, Tensor]:
        """Targets are a grid where no number of queried points is known."""
        if self.queries is None:
            targets = torch.zeros(count, *self.grid, dtype=torch.uint8)
        else:
            targets = torch.zeros(count, self.queries, 4, dtype=torch.float16)
        return torch.zeros(count, self.num_points, 3), targets

    def settle(self, protocol: Mapping[str, Any]) -> Domain:
        """Treat one's own meshes as the set's were, and expect its number of queried points.

        Refuses a set whose grids have another size.
        """
        layout, form, told = protocol.get("layout"), protocol.get("form") or {}, {}
        if layout == "occupancy-networks":  # queried points, not grids
            told = {"fill": 1 / meshes.QUERIED_CUBE, "queries": form.get("queries")}
        elif (cells := form.get("resolution", self.size)) != self.size:
            raise ValueError(
                f"domain.size={self.size}, but the grids of data.train have {cells} cells a side; "
                f"try --domain.size {cells}"
            )
        elif layout == "mesh-files":
            usual = meshes.Form()
            told = {name: form.get(name) for name in ("fill", "close") if form.get(name) != getattr(usual, name)}
        return override(self, {name: value for name, value in told.items() if getattr(self, name) is None})

    @property
    def num_copies(self) -> int:
        return 1

    def copies(self, signal: Signal) -> tuple[Signal, ...]:
        return (signal,)

    def supervise(self, signal: Signal, count: int) -> tuple[Queries, Float[Tensor, "batch points 1"]]:
        """Centres of cells, or queried points, drawn with replacement; occupancy in {0, 1}."""
        return self._draw(signal, "supervise", count)

    def measurements(self, signal: Signal, count: int | None = None) -> tuple[Queries, Float[Tensor, "batch points 1"]]:
        """As in training; None takes `fit_points`, which do not depend on the sample's seed."""
        if count is not None:
            return self._draw(signal, "measurements", count)
        targets = _tensor(signal)
        total = targets[0].numel() if targets.dim() == 4 else targets.shape[1]
        if self.fit_points < total or self.near:
            fixed = dataclasses.replace(signal, seed=torch.zeros_like(signal.seed))
            return self._draw(fixed, "measurements", self.fit_points)
        return self._at(targets, torch.arange(total, device=targets.device).expand(len(targets), -1))

    def _draw(self, signal: Signal, purpose: str, count: int) -> tuple[Queries, Tensor]:
        targets = _tensor(signal)
        total = targets[0].numel() if targets.dim() == 4 else targets.shape[1]
        cells = randomness.integers(signal.seed, purpose, (count,), total)
        num_near = round(self.near * count) if targets.dim() == 4 else 0
        if num_near:
            occupied = targets[:, None].float()
            mixed = F.max_pool3d(occupied, 3, 1, 1) != -F.max_pool3d(-occupied, 3, 1, 1)
            counts = mixed.flatten(1).cumsum(1)  # [batch, cells]: how many mixed cells up to each
            part = randomness.uniform(signal.seed, purpose + " near", (num_near,))
            rank = (part * counts[:, -1:]).floor() + 1
            chosen = torch.searchsorted(counts, rank.to(counts.dtype))
            has_any = counts[:, -1:] > 0  # else it is empty or full, and the drawn cells stay
            cells[:, :num_near] = torch.where(has_any, chosen.clamp(max=total - 1), cells[:, :num_near])
        return self._at(targets, cells)

    def _at(self, targets: Tensor, cells: Tensor) -> tuple[Queries, Tensor]:
        """Places and occupancy of cells of a grid, x fastest, or of queried points."""
        if targets.dim() == 3:  # queried points [batch, points, 4]: the place, then the occupancy
            rows = targets.gather(1, cells[..., None].expand(-1, -1, 4)).float()
            return Queries(rows[..., :3]), rows[..., 3:]
        size = targets.shape[-1]
        x, y, z = cells % size, cells // size % size, cells // size**2
        coords = (torch.stack([x, y, z], dim=-1) * 2 + 1) / size - 1
        return Queries(coords), targets.flatten(1).gather(1, cells)[..., None].float()

    def nll(self, observed: Tensor, values: Tensor) -> Float[Tensor, " batch"]:
        if self.likelihood == "gaussian":
            return 0.5 * (observed - values).square().mean(dim=(1, 2))
        return F.binary_cross_entropy_with_logits(observed, values, reduction="none").mean(dim=(1, 2))

    def squared_error(self, observed: Tensor, values: Tensor) -> Float[Tensor, " batch"]:
        return (self._probability(observed) - values).square().mean(dim=(1, 2))

    def _probability(self, values: Tensor) -> Tensor:
        return values.sigmoid() if self.likelihood == "bernoulli" else values.clamp(0, 1)

    def render(
        self, field: Field, resolution: int, *, chunk_points: int = 1 << 17
    ) -> Float[Tensor, "batch resolution resolution resolution"]:
        """Probabilities of being inside on a grid [batch, z, y, x] of cell centres, in [0, 1]."""
        centres = pixel_centres(resolution, field.device)
        found = torch.empty(len(field), resolution**3, device=field.device)
        for part, values in evaluate_grid(field, (centres,) * 3, chunk_points=chunk_points, title="shape"):
            found[:, part] = self._probability(values)[..., 0]
        return found.unflatten(1, (resolution,) * 3)

    def truth(self, signal: Signal) -> Float[Tensor, "batch size size size"]:
        """The grid; of queried points, the share of each cell's points that are inside.

        A cell without a point takes the share among the points of the cells around it; where these have none either,
        the mean of what was found so for them, ring by ring.
        """
        targets = _tensor(signal)
        if targets.dim() == 4:
            return targets.float()
        cell = ((targets[..., :3].float().clamp(-1, 1) + 1) / 2 * self.size).long().clamp(max=self.size - 1)
        index = (cell[..., 2] * self.size + cell[..., 1]) * self.size + cell[..., 0]
        inside = targets[..., 3].float()
        rows = torch.stack([inside, torch.ones_like(inside)], dim=1)  # [batch, 2, points]
        grid = rows.new_zeros(len(rows), 2, self.size**3).scatter_add(2, index[:, None].expand_as(rows), rows)
        grid = grid.unflatten(2, (self.size,) * 3)  # of each cell, how many points are inside, and how many there are
        while not (known := grid[:, 1:] > 0).all():
            around = F.avg_pool3d(grid, 3, 1, 1, divisor_override=1)
            grid = torch.where(known, grid, around / around[:, 1:].clamp(min=1))
        return grid[:, 0] / grid[:, 1]

    def enlarge(self, rendered: Tensor, resolution: int) -> Tensor:
        """Trilinear."""
        return F.interpolate(rendered[:, None], size=(resolution,) * 3, mode="trilinear", align_corners=False)[:, 0]

    def naive(self, signal: Signal, *, numbers: int) -> dict[str, Tensor]:
        """Nothing anywhere, and trilinear interpolation from at most as many cells."""
        truth = self.truth(signal)
        side = min(max(1, int(numbers ** (1 / 3) + 1e-6)), self.size)
        small = F.adaptive_avg_pool3d(truth[:, None], side)[:, 0]
        return {
            "an empty grid": torch.zeros_like(truth),
            f"trilinear from {side} x {side} x {side} cells": self.enlarge(small, self.size),
        }

    def pictures(self, rendered: Tensor, azimuth: float = _AZIMUTH) -> Float[Tensor, "batch 3 height width"]:
        """Each solid from obliquely above, lit from the right, on white; the surface is where one half is crossed."""
        pixels = min(max(2 * rendered.shape[-1], _PICTURE[0]), _PICTURE[1])
        return torch.stack([shaded(grid, pixels, azimuth=azimuth, up=self.up) for grid in rendered])

    def shown(self, signal: Signal) -> dict[str, Float[Tensor, "3 height width"]]:
        truth = self.truth(signal)
        cell = ((signal.inputs.clamp(-1, 1) + 1) / 2 * self.size).long().clamp(max=self.size - 1)[0]
        seen = torch.zeros_like(truth)
        seen[0, cell[:, 2], cell[:, 1], cell[:, 0]] = 1
        return {
            f"original, {self.size} cells": self.pictures(truth)[0],
            f"cells of the {self.num_points} points that the encoder saw": self.pictures(seen)[0],
        }

    def thumbnails(self, rendered: Tensor) -> Float[Tensor, "batch numbers"]:
        return F.adaptive_avg_pool3d(rendered[:, None], min(_THUMBNAIL, rendered.shape[-1])).flatten(1)

    def surface(self, rendered: Tensor, count: int) -> Float[Tensor, "batch count 3"]:
        found = torch.full((len(rendered), count, 3), torch.nan)
        for row, grid in enumerate(rendered.cpu().numpy()):
            if grid.max() > 0.5 > grid.min():
                vertices, faces = meshes.from_grid(grid)
                found[row] = torch.from_numpy(meshes.points_on(vertices[faces], count).astype(np.float32))
        return found.to(rendered.device)

    def save(self, rendered: Tensor, path: Path) -> None:
        """A mesh by marching cubes (.glb, .ply, .obj, .off, .stl), a turntable (.png, .gif), or a grid with points of
        its surface (.npz). Raises ValueError where there is no surface.
        """
        suffix = path.suffix.lower()
        if suffix not in self.suffixes:
            raise ValueError(
                f"{path.name}: shapes are written as {', '.join(self.suffixes)}; choose one of these suffixes"
            )
        if suffix in (".png", ".gif"):
            angles = [_AZIMUTH + 2 * math.pi * turn / _TURNTABLE for turn in range(_TURNTABLE)]
            frames = [self.pictures(rendered[None], angle)[0] for angle in angles]
            if suffix == ".png":
                to_pillow(torch.cat(frames, dim=2)).save(path)
            else:
                first, *others = (to_pillow(frame) for frame in frames)
                first.save(path, save_all=True, append_images=others, duration=250, loop=0)
        elif suffix == ".npz":
            points = self.surface(rendered[None], 10_000)[0].cpu().numpy()
            with path.open("wb") as file:  # a path's suffix would be added to, were it .NPZ
                np.savez_compressed(file, occupancy=rendered.cpu().numpy().astype(np.float16), points=points)
        else:
            meshes.write_mesh(*meshes.from_grid(rendered.cpu().numpy()), path)


def _tensor(signal: Signal) -> Tensor:
    assert isinstance(signal.targets, Tensor)
    return signal.targets


def _targets(record: Record, size: int, count: int | None) -> Tensor:
    """A grid, uint8 [z, y, x], or queried points, float16 [points, 4]: place and occupancy."""
    if count is None and "occupancy.npy" in record:
        return torch.from_numpy(meshes.unpack(record["occupancy.npy"], size).astype(np.uint8))
    rows = torch.from_numpy(read_rows(record["queries.npy"], 4)).half()
    if count is not None and len(rows) != count:
        raise ValueError(f"{len(rows)} queried points, expected domain.queries={count}; all of a set must have as many")
    if not rows.isfinite().all() or rows[:, 3].min() < 0 or rows[:, 3].max() > 1:
        raise ValueError("queried points beyond float16, or occupancies outside [0, 1]")
    return rows


def shaded(
    grid: Float[Tensor, "z y x"], pixels: int, *, azimuth: float, up: Literal["y", "z"]
) -> Float[Tensor, "3 pixels pixels"]:
    """A solid seen from a direction without perspective, by the first cell along each ray that is above one half."""
    away = torch.tensor(
        [math.sin(azimuth) * math.cos(_ELEVATION), math.sin(_ELEVATION), math.cos(azimuth) * math.cos(_ELEVATION)]
    )
    right = torch.tensor([math.cos(azimuth), 0.0, -math.sin(azimuth)])
    axes = torch.stack([right, torch.linalg.cross(away, right), away])  # right, up, to the eye; y is up
    if up == "z":
        axes = torch.stack([axes[:, 0], -axes[:, 2], axes[:, 1]], dim=1)
    axes = axes.to(grid.device)
    side = pixel_centres(pixels, grid.device) * 1.25
    depth = pixel_centres(pixels, grid.device).flip(0) * 1.5  # from the eye on
    d, v, u = torch.meshgrid(depth, -side, side, indexing="ij")
    points = torch.stack([u, v, d], dim=-1) @ axes  # [depth, height, width, 3]
    soft = F.avg_pool3d(grid[None, None], 3, 1, 1, count_include_pad=False)
    found = F.grid_sample(grid[None, None], points[None], align_corners=False, padding_mode="zeros")[0, 0]
    hit = found > 0.5
    first = hit.float().argmax(0)  # [height, width]
    place = points.gather(0, first[None, ..., None].expand(1, -1, -1, 3))  # [1, height, width, 3]
    step = 2.0 / grid.shape[0]
    slopes = []
    for axis in axes:
        sides = [F.grid_sample(soft, (place + sign * step * axis)[None], align_corners=False) for sign in (1, -1)]
        slopes.append(sides[1] - sides[0])
    normal = F.normalize(torch.cat(slopes, dim=0).view(3, pixels, pixels), dim=0)
    light = F.normalize(torch.tensor(_LIGHT, device=grid.device), dim=0)
    brightness = 0.35 + 0.6 * (normal * light.view(3, 1, 1)).sum(0).clamp(min=0)
    colour = torch.tensor([0.72, 0.8, 0.95], device=grid.device).view(3, 1, 1) * brightness
    return torch.where(hit.any(0), colour, 1.0).clamp(0, 1)
