"""Models. `AnyAutoencoder` and `AnyPrior` are the registries: a new model is one more member."""

from distributed_inr.models.d2c_vae import D2CVAE
from distributed_inr.models.field_autoencoder import FieldAutoencoder
from distributed_inr.models.latent_diffusion import LatentDiffusion
from distributed_inr.models.latent_prior import LatentPrior

AnyAutoencoder = D2CVAE
AnyPrior = LatentDiffusion

__all__ = ["AnyAutoencoder", "AnyPrior", "D2CVAE", "FieldAutoencoder", "LatentDiffusion", "LatentPrior"]
