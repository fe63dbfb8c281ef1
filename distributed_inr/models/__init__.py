"""Models. `AnyAutoencoder` and `AnyPrior` are the registries: a new model is one more member."""

from typing import Annotated

import pydantic

from distributed_inr.models.d2c_vae import D2CVAE
from distributed_inr.models.field_autoencoder import FieldAutoencoder
from distributed_inr.models.hierarchical_diffusion import HierarchicalDiffusion
from distributed_inr.models.latent_diffusion import LatentDiffusion
from distributed_inr.models.latent_prior import LatentPrior
from distributed_inr.models.layers_of_experts import LayersOfExperts

AnyAutoencoder = Annotated[D2CVAE | LayersOfExperts, pydantic.Field(discriminator="kind")]
AnyPrior = Annotated[LatentDiffusion | HierarchicalDiffusion, pydantic.Field(discriminator="kind")]

__all__ = [
    "AnyAutoencoder",
    "AnyPrior",
    "D2CVAE",
    "FieldAutoencoder",
    "HierarchicalDiffusion",
    "LatentDiffusion",
    "LatentPrior",
    "LayersOfExperts",
]
