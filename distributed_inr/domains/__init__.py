"""Domains: what the functions are about. `AnyDomain` is the registry: a new domain is one more member."""

from typing import Annotated

import pydantic

from distributed_inr.domains.domain import Domain, Queries, Record, Signal, collate
from distributed_inr.domains.image import Image
from distributed_inr.domains.motion import Motion
from distributed_inr.domains.scene import Scene
from distributed_inr.domains.shape import Shape
from distributed_inr.domains.video import Video

AnyDomain = Annotated[Image | Shape | Video | Scene | Motion, pydantic.Field(discriminator="kind")]

__all__ = [
    "AnyDomain",
    "Domain",
    "Image",
    "Motion",
    "Queries",
    "Record",
    "Scene",
    "Shape",
    "Signal",
    "Video",
    "collate",
]
