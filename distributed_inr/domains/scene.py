"""Scenes: functions of space and direction to density and colour, measured by the rays of posed views."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from distributed_inr import randomness
from distributed_inr.config import config, override
from distributed_inr.domains import rays, scene_mesh, scene_rays, scene_views
from distributed_inr.domains.domain import Domain, Queries, Record, Signal, caption, collate
from distributed_inr.domains.image import downscale
from distributed_inr.field import Field
from distributed_inr.raw import clips, posed_views, view_folders
from distributed_inr.raw.posed_views import CAMERA_DIM, Fit, Form, Ground

Views = Float[Tensor, "batch views 3 height width"]

_THUMBNAIL = 32
"""Pixels a side of a view when scenes are compared with training scenes."""
_ORBIT_RADIUS, _ORBIT_ANGLE = 2.2, 0.9
"""Of rendered orbits: the unit sphere fills the picture."""


@config
class Scene(Domain):
    """Radiance fields of objects inside the unit sphere, z up, with `ground` behind them.

    The field's four values are density and colour before their activations: the density is
    `density_scale` * softplus(value + `density_bias`) for each unit of length, the colour a sigmoid. Renderings are
    views [batch, views, 3, height, width] in [0, 1].
    """

    kind: Literal["scene"] = "scene"
    size: Annotated[int, pydantic.Field(gt=0)] = 64
    """Base resolution: pixels a side of rendered views."""
    cells: Annotated[int, pydantic.Field(gt=0)] = 64
    """Cells a side of the planes that an encoder pools points into."""
    view_size: Annotated[int, pydantic.Field(gt=0)] = 64
    """Pixels a side of the views in the shards; rays are drawn from them."""
    num_views: Annotated[int, pydantic.Field(gt=1)] = 24
    """Views of each object: so many of those in the shards, evenly spaced; training views are taken from those that
    points were carved from, held-out views from the others."""
    hold_out_every: Annotated[int, pydantic.Field(gt=1)] = 6
    """Keep every so many-th view of each object from training; reconstructions are measured on these."""
    num_points: Annotated[int, pydantic.Field(gt=0)] = 2048
    """Coloured points that the encoder sees, drawn from those in the shards."""
    point_noise: Annotated[float, pydantic.Field(ge=0)] = 0.005
    """Standard deviation of the noise added to the points' places."""
    ground: Ground = "white"
    """What is seen where nothing is: of the views in the shards, and of renderings."""
    bounds: rays.Bounds = "sphere"
    """Where along rays the field is asked: inside the unit sphere, or inside [-1, 1]^3."""
    samples_per_ray: Annotated[int, pydantic.Field(gt=0)] = 32
    """Steps of a ray in training and fitting, each asked at a random depth in training."""
    render_samples: Annotated[int, pydantic.Field(gt=0)] = 64
    """Steps of a ray in renderings."""
    object_share: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """Of the rays drawn in training, the share that is drawn from pixels that do not show the ground; the others come
    from all pixels. The loss is the mean over such rays, not over pixels: the object, often a tenth of the picture,
    weighs more."""
    fit_rays: Annotated[int, pydantic.Field(gt=0)] = 2048
    """Rays of the training views that a latent is fitted to where an encoder is an optimisation; the same for all."""
    density_scale: Annotated[float, pydantic.Field(gt=0)] = 20.0
    """Density for each unit of the activated value. Large, because the object's walls are thin: a density of 50 lets a
    third of the light through a wall of 0.02."""
    density_bias: float = -3.0
    """Added to the value before its activation; at -3, a field of zeros is a mist that hides most of what is behind."""
    orbit_views: Annotated[int, pydantic.Field(gt=1)] = 48
    """Frames of a film once around the object."""
    orbit_elevation: Annotated[float, pydantic.Field(gt=-90, lt=90)] = 25.0
    """Degrees above the ground from which films look, and renderings where the training set's cameras differ."""
    scale: Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)] | None = None
    """Multiplies all positions of one's own folders; none takes the --scale that the set was prepared with."""
    fit: Fit | None = None
    """Where one's own folders' unit sphere lies; none takes the --fit that the set was prepared with."""
    cameras: tuple[tuple[float, ...], ...] = ()
    """Cameras of renderings, 20 numbers each, which the set tells: the held-out ones of all its objects. Empty where
    these do not share them, and renderings are from a few places of an orbit."""

    grid_option: ClassVar[str] = "cells"
    coord_dim: ClassVar[int] = 3
    value_dim: ClassVar[int] = 4
    view_dim: ClassVar[int] = 3
    num_unviewed: ClassVar[int] = 1
    value_span: ClassVar[float] = 1.0
    input_kind: ClassVar[str] = "points"
    input_dim: ClassVar[int] = 6
    metrics: ClassVar[tuple[str, ...]] = ("clip_psnr", "clip_ssim")
    noun: ClassVar[str] = "scene"
    kept_back: ClassVar[str] = "views"
    suffixes: ClassVar[tuple[str, ...]] = (*scene_views.SUFFIXES, *scene_mesh.SUFFIXES)
    file_options: ClassVar[tuple[str, ...]] = ("frames", "fps")
    unit: ClassVar[str] = "px"
    fine: ClassVar[int] = 2
    max_resolution: ClassVar[int] = 4096

    def __post_init__(self) -> None:
        if self.view_size < self.size:
            raise ValueError(
                f"domain.view_size={self.view_size} is smaller than domain.size={self.size}; pixels are never "
                "invented: prepare larger views or lower domain.size"
            )
        if any(len(camera) != CAMERA_DIM for camera in self.cameras):
            raise ValueError(f"domain.cameras has cameras that are not {CAMERA_DIM} numbers; leave it empty")

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.cells, self.cells, self.cells

    @property
    def ground_level(self) -> float:
        return 1.0 if self.ground == "white" else 0.0

    @property
    def comparable(self) -> bool:
        return bool(self.cameras)

    def read(self, record: Record, seed: int) -> Signal:
        return self._read(record, seed, self.num_views)

    def open(self, path: Path) -> Signal:
        """A folder of views with their cameras: transforms.json (nerfstudio, instant-ngp) or SRN."""
        form = Form(
            size=self.view_size,
            ground=self.ground,
            num_points=max(self.num_points, Form.num_points),
            max_views=max(self.num_views, Form.max_views),
            scale=self.scale,
            fit=self.fit or Form.fit,
            hold_out_every=self.hold_out_every,
        )
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; give one of views, with transforms.json or SRN's intrinsics.txt")
        try:
            record = {"__key__": path.name, **posed_views.encode(view_folders.read_folder(path, form.max_views), form)}
        except ValueError as error:
            raise ValueError(f"{path} is not a usable scene: {error}") from None
        return collate([self._read(record, 0, None)])

    def _read(self, record: Record, seed: int, num_views: int | None) -> Signal:
        """One record with as many of its views; None takes all."""
        key = record["__key__"]
        try:
            found = posed_views.decode(record, size=self.view_size, num_views=num_views, every=self.hold_out_every)
        except ValueError as error:
            raise ValueError(f"{key}.{error}") from None
        (views, cameras, points), own = map(torch.from_numpy, found), torch.tensor([seed])
        order = randomness.uniform(own, "points", (len(points),))[0].argsort()
        drawn = points[order.repeat(-(-self.num_points // len(order)))[: self.num_points]]
        noise = randomness.normal(own, "point noise", (self.num_points, 3))[0] * self.point_noise
        return Signal(
            key=key,
            seed=own[0],
            position=torch.tensor(0),
            inputs=torch.cat([drawn[:, :3] + noise, drawn[:, 3:]], dim=1),
            targets={"views": views.movedim(-1, 1).contiguous(), "cameras": cameras},
            text=caption(record),
        )

    def blank(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        views = torch.zeros(count, self.num_views, 3, self.view_size, self.view_size, dtype=torch.uint8)
        cameras = rays.orbit(self.num_views, elevation=0.0, radius=_ORBIT_RADIUS, angle=_ORBIT_ANGLE)
        return torch.zeros(count, self.num_points, 6), {"views": views, "cameras": cameras.repeat(count, 1, 1)}

    def settle(self, protocol: Mapping[str, Any]) -> Domain:
        """Place one's own folders as the set's were, and render from the held-out cameras, where all training objects
        share them. Refuses a set of another ground, or whose points were carved without other views.
        """
        shared, form = protocol.get("cameras"), protocol.get("form") or {}
        if (ground := form.get("ground", self.ground)) != self.ground:
            raise ValueError(f"domain.ground={self.ground}, but the set's views lie on {ground}; set it to {ground}")
        if (pixels := form.get("size", self.view_size)) != self.view_size:
            raise ValueError(
                f"domain.view_size={self.view_size}, but the set's views have {pixels} pixels a side; "
                f"try --domain.view-size {pixels}"
            )
        if (every := form.get("hold_out_every", own := self.hold_out_every)) != own:
            raise ValueError(
                f"domain.hold_out_every={own}, but the set was prepared with {every}, and points must not know "
                f"held-out views; set it to {every}, or prepare with --hold-out-every {own}"
            )
        told: dict[str, Any] = {}
        for name in ("scale", "fit"):
            if getattr(self, name) is None and form.get(name) not in (None, getattr(Form, name)):
                told[name] = form[name]
        if shared:
            own = posed_views.chosen(len(shared), self.num_views, self.hold_out_every)
            told["cameras"] = [shared[own[i]] for i in posed_views.held_out(self.num_views, self.hold_out_every)]
        settled = override(self, told) if told else self
        if self.cameras and (settled.cameras != self.cameras or not shared):
            raise ValueError(
                f"domain.cameras holds {len(self.cameras)} cameras that the set does not tell of; leave it empty"
            )
        return settled

    @property
    def num_copies(self) -> int:
        return 1

    def copies(self, signal: Signal) -> tuple[Signal, ...]:
        return (signal,)

    def supervise(self, signal: Signal, count: int) -> tuple[Queries, Float[Tensor, "batch rays 3"]]:
        """Rays of the training views, each asked at random depths, one in each step."""
        origins, directions, colours = self._draw(signal, signal.seed, count)
        near, far = rays.interval(origins, directions, self.bounds)
        within = randomness.uniform(signal.seed, "depths", (count, self.samples_per_ray))
        return Queries(origins, directions, rays.depths_between(near, far, within)), colours

    def measurements(self, signal: Signal, count: int | None = None) -> tuple[Queries, Float[Tensor, "batch rays 3"]]:
        """Rays of the training views, asked in the middles of their steps. All would be too many to hold: None takes
        `fit_rays`, chosen as in training but not by the sample's seed.
        """
        seeds = torch.zeros_like(signal.seed) if count is None else signal.seed
        origins, directions, colours = self._draw(signal, seeds, self.fit_rays if count is None else count)
        return Queries(origins, directions), colours

    def _draw(self, signal: Signal, seeds: Int64[Tensor, " batch"], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Origins, directions and colours of `count` rays of the training views of each signal."""
        views, cameras = self._views(signal, held_out=False)
        share, ground = self.object_share, self.ground_level
        return scene_rays.draw(views, cameras, seeds, count, object_share=share, ground=ground)

    def _views(self, signal: Signal, *, held_out: bool) -> tuple[Tensor, Tensor]:
        """The held-out or the training views [batch, views, 3, side, side], and their cameras."""
        assert isinstance(signal.targets, dict)
        views, cameras = signal.targets["views"], signal.targets["cameras"]
        kept = posed_views.held_out(views.shape[1], self.hold_out_every)
        chosen = kept if held_out else [i for i in range(views.shape[1]) if i not in kept]
        return views[:, chosen], cameras[:, chosen]

    def observe(self, field: Field, queries: Queries) -> Float[Tensor, "batch rays 3"]:
        """The colours of rays (volume rendering)."""
        assert queries.view is not None
        depths = self.samples_per_ray if queries.depths is None else queries.depths
        density, colours, _, length = self._ask(field, queries.coords, queries.view, depths)
        return rays.composite(density, colours, length, self.ground_level)

    def _ask(
        self, field: Field, origins: Tensor, directions: Tensor, depths: Tensor | int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return scene_rays.ask(field, origins, directions, depths, bounds=self.bounds, density=self.density)

    def density(self, value: Tensor) -> Tensor:
        """Density for each unit of length, of the field's first value."""
        return self.density_scale * F.softplus(value + self.density_bias)

    def nll(self, observed: Tensor, values: Tensor) -> Float[Tensor, " batch"]:
        return 0.5 * (observed - values).square().mean(dim=(1, 2))

    def render(
        self,
        field: Field,
        resolution: int,
        *,
        cameras: Float[Tensor, "batch views 20"] | Float[Tensor, "views 20"] | None = None,
        chunk_points: int = 1 << 18,
    ) -> Views:
        """Views of any resolution from any cameras. `chunk_points` bounds the memory: points asked at once."""
        cameras = self._cameras_for(field, cameras)
        found = torch.empty(len(field), 3, cameras.shape[1] * resolution**2, device=field.device)
        for part, origins, directions in scene_rays.pieces(cameras, resolution, chunk_points // self.render_samples):
            density, colours, _, length = self._ask(field, origins, directions, self.render_samples)
            seen = rays.composite(density, colours, length, self.ground_level)
            found[:, :, part] = seen.clamp(0, 1).transpose(1, 2)
        return found.unflatten(2, (-1, resolution, resolution)).transpose(1, 2).contiguous()

    def depth(
        self,
        field: Field,
        resolution: int,
        *,
        cameras: Float[Tensor, "batch views 20"] | Float[Tensor, "views 20"] | None = None,
        chunk_points: int = 1 << 18,
    ) -> Float[Tensor, "batch views resolution resolution"]:
        """How far each pixel's ray goes on average, in units of the unit sphere; where it meets nothing, to its end."""
        cameras = self._cameras_for(field, cameras)
        found = torch.empty(len(field), cameras.shape[1] * resolution**2, device=field.device)
        for part, origins, directions in scene_rays.pieces(cameras, resolution, chunk_points // self.render_samples):
            density, _, near, length = self._ask(field, origins, directions, self.render_samples)
            found[:, part] = rays.expected_depth(density, near, length)
        return found.unflatten(1, (-1, resolution, resolution))

    def _cameras_for(self, field: Field, cameras: Tensor | None) -> Float[Tensor, "batch views 20"]:
        if cameras is None:
            count = len(posed_views.held_out(self.num_views, self.hold_out_every))
            cameras = torch.tensor(self.cameras) if self.cameras else self.orbit(count)
        return cameras.to(field.device).expand(len(field), -1, -1)

    def orbit(self, count: int) -> Float[Tensor, "count 20"]:
        """Cameras once around the object."""
        return rays.orbit(count, elevation=self.orbit_elevation, radius=_ORBIT_RADIUS, angle=_ORBIT_ANGLE)

    def truth(self, signal: Signal) -> Views:
        """The held-out views."""
        return self._at_base(self._views(signal, held_out=True)[0])

    def _at_base(self, views: UInt8[Tensor, "batch views 3 side side"]) -> Views:
        return ((downscale(views.flatten(0, 1), self.size) + 1) / 2).unflatten(0, views.shape[:2])

    def reproduce(self, field: Field, signal: Signal) -> Views:
        return self.render(field, self.size, cameras=self._views(signal, held_out=True)[1])

    def enlarge(self, rendered: Tensor, resolution: int) -> Tensor:
        """Bicubic, each view."""
        return scene_views.resized(rendered, resolution)

    def naive(self, signal: Signal, *, numbers: int) -> dict[str, Tensor]:
        """The scene's own training views in place of the held-out ones: the one whose camera is nearest, and the mean.

        They are not made from `numbers` numbers: they need all the views.
        """
        views, cameras = self._views(signal, held_out=False)
        _, wanted = self._views(signal, held_out=True)
        own, others = (c[..., [3, 7, 11]] for c in (wanted, cameras))  # places
        nearest = torch.cdist(own, others).argmin(2)
        seen = self._at_base(views)
        chosen = seen.gather(1, nearest[:, :, None, None, None].expand(-1, -1, *seen.shape[2:]))
        mean = seen.mean(1, keepdim=True).expand_as(chosen)
        return {"its nearest training view": chosen, "the mean of its training views": mean}

    def pictures(self, rendered: Tensor) -> Tensor:
        """The views beside each other, in rows of at most eight."""
        return scene_views.beside(rendered, ground=self.ground_level)

    def shown(self, signal: Signal) -> dict[str, Tensor]:
        """Four of the training views, and the held-out ones."""
        views, _ = self._views(signal, held_out=False)
        chosen = self._at_base(views[:, view_folders.evenly(views.shape[1], 4)])
        return {"seen": self.pictures(chosen)[0], f"not seen, {self.size} px": self.pictures(self.truth(signal))[0]}

    def thumbnails(self, rendered: Tensor) -> Tensor:
        return scene_views.resized(rendered, min(_THUMBNAIL, rendered.shape[-1])).flatten(1)

    def options_of(self, suffix: str) -> tuple[str, ...]:
        """Only films have any."""
        return self.file_options if suffix in scene_views.FILM_SUFFIXES else ()

    def check_file(self, suffix: str, resolution: int, *, frames: int | None = None, fps: float | None = None) -> None:
        if suffix in scene_mesh.SUFFIXES and resolution > scene_mesh.MAX_RESOLUTION:
            most = scene_mesh.MAX_RESOLUTION
            raise ValueError(f"resolution={resolution} must lie in 1..{most} cells a side for {suffix} files; lower it")
        clips.check_rate(suffix, fps or self._rate(frames or self.orbit_views))

    def write(
        self, field: Field, resolution: int, path: Path, *, frames: int | None = None, fps: float | None = None
    ) -> Views:
        """Once around the object as a film (.mp4, .webm, .gif, .webp), view by view; its surface as a coloured mesh
        (.glb, .ply, .obj); or the rendering's views beside each other (.png).

        Args:
            frames: of the film.
            fps: frames a second of the film; None keeps the duration of `orbit_views` frames.
        """
        suffix = path.suffix.lower()
        self.check_file(suffix, resolution, frames=frames, fps=fps)
        if suffix in scene_mesh.SUFFIXES:
            scene_mesh.save(field, resolution, path, density=self.density, inside_sphere=self.bounds == "sphere")
        else:
            is_film = suffix in scene_views.FILM_SUFFIXES
            cameras = self.orbit(frames or self.orbit_views) if is_film else self._cameras_for(field, None)[0]
            bar = tqdm(cameras.split(1), desc=path.name, unit="view", delay=3, disable=None, leave=False)
            views = (self.render(field, resolution, cameras=camera)[0, 0].cpu() for camera in bar)
            scene_views.write(views, path, ground=self.ground_level, rate=fps or self._rate(len(cameras)))
        return self.render(field, min(resolution, 2 * self.size)).cpu()

    def save(self, rendered: Float[Tensor, "views 3 height width"], path: Path) -> None:
        """The views one after the other as a film (.mp4, .webm, .gif, .webp), or beside each other as .png."""
        scene_views.write(rendered, path, ground=self.ground_level)

    def _rate(self, frames: int) -> float:
        """Of films: they last as long whatever the number of frames."""
        return scene_views.FRAME_RATE * frames / self.orbit_views
