"""Raw data as they lie on disks, by domain. `SOURCES` is the registry: a new domain is one more member."""

from distributed_inr.data.layouts.images import IMAGES
from distributed_inr.data.layouts.item import Item, Part, select
from distributed_inr.data.layouts.motions import MOTIONS
from distributed_inr.data.layouts.scenes import SCENES
from distributed_inr.data.layouts.shapes import SHAPES
from distributed_inr.data.layouts.source import Source
from distributed_inr.data.layouts.videos import VIDEOS

SOURCES: dict[str, Source] = {source.domain: source for source in (IMAGES, SHAPES, VIDEOS, SCENES, MOTIONS)}

__all__ = ["SOURCES", "Item", "Part", "Source", "select"]
