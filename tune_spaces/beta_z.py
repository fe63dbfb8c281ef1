"""The weight of the KL term, beta_z (DDMI, eq. 5), for the D2C-VAE.

The preset's own is 1.5e-5. It multiplies the KL in nats beside a mean over pixels, so that small numbers are much.
"""

from ray import tune

SPACE = {"autoencoder.kl_weight": tune.grid_search([1e-6, 1.5e-5, 1.5e-4, 1.5e-3])}
