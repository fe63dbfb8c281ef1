"""The length of the binary conditions C (CHINR, section 4.4 and table 2), for hierarchical diffusion; 0 is none."""

from ray import tune

SPACE = {"prior.condition_bits": tune.grid_search([0, 4, 8, 12, 15, 20])}
