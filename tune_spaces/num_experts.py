"""The number of experts of each layer (CHINR, eq. 3), for layers of experts.

From many to few: with `--scheduler asha` the first trials set the mark that later ones must reach. With 256, the
bundled preset's learning rate is too large (LOG.md).
"""

from ray import tune

SPACE = {"autoencoder.num_experts": tune.grid_search([128, 64, 32, 16, 8])}
