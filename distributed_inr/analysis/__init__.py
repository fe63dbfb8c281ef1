"""Analysis of finished runs: control over what is made, and what latents and priors are like.

    model = dinr.load("runs/chinr/furniture-image")
    query = analysis.choose(model, "held-out", count=4)
    found = analysis.retrieval(model, query, layer=2)
    analysis.render(model, found.values[0])                   # the nearest signals' functions as pictures

Layers are counted from 1, as in the paper. Everything random comes from `seed`, and results do not depend on batch
sizes. `analysis.figures` draws results; `control_files` and `statistics_files` write each analysis as pictures and
tables, as jobs/analyse.py does.
"""

from distributed_inr.analysis.conditioning import conditions, deviations, share_alone
from distributed_inr.analysis.control import composition, interpolation, layerwise, redraw, tree
from distributed_inr.analysis.neighbours import ablation, memorisation, retrieval
from distributed_inr.analysis.sources import Latents, choose, file_latents, held_out_latents, render, training_latents
from distributed_inr.analysis.spectra import frequencies, radial_power
from distributed_inr.analysis.statistics import clusters, correlations, k_means, principal_components, svcca

__all__ = [
    "Latents",
    "ablation",
    "choose",
    "clusters",
    "composition",
    "conditions",
    "correlations",
    "deviations",
    "file_latents",
    "frequencies",
    "held_out_latents",
    "interpolation",
    "k_means",
    "layerwise",
    "memorisation",
    "principal_components",
    "radial_power",
    "redraw",
    "render",
    "retrieval",
    "share_alone",
    "svcca",
    "training_latents",
    "tree",
]
