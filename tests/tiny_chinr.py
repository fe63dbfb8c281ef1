"""A real run of CHINR at tiny size: trained-shape models with random weights, saved as a job saves them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_run import tiny_experiment

from distributed_inr.config import override, to_json
from distributed_inr.experiment import Experiment
from distributed_inr.models import HierarchicalDiffusion, LayersOfExperts
from distributed_inr.models.layer_denoisers import MLPUNet


def chinr_experiment(folder: Path) -> Experiment:
    tiny = tiny_experiment(folder)
    return Experiment(
        name="tiny",
        family="chinr",
        output=tiny.output,
        domain=override(tiny.domain, {"scales": (1.0,), "scale_weights": (1.0,), "flip": False}),
        data=tiny.data,
        autoencoder=LayersOfExperts(num_layers=4, num_experts=9, width=16, latent_dim=8, num_points=64),
        prior=HierarchicalDiffusion(denoiser=MLPUNet(width=16, num_blocks=1), condition_bits=3),
        autoencoder_training=tiny.autoencoder_training,
        prior_training=tiny.prior_training,
        sampling=tiny.sampling,
        evaluation=tiny.evaluation,
    )


def write_chinr(folder: Path, **changes: object) -> Path:
    """A run folder holding config.json and both models; `changes` are dotted paths with __ for the dots."""
    experiment = override(chinr_experiment(folder), {name.replace("__", "."): value for name, value in changes.items()})
    torch.manual_seed(0)
    autoencoder = experiment.autoencoder.build(experiment.domain)
    prior = experiment.prior.build(autoencoder.latent_shape)
    for parameter in prior.parameters():  # the last layer starts at zero: let every weight matter
        torch.nn.init.normal_(parameter, std=0.15)
    shape = autoencoder.latent_shape
    prior.normalise_from(torch.linspace(-1, 1, shape[1]).expand(shape), torch.linspace(0.5, 2, shape[1]).expand(shape))
    run = experiment.folder
    for name, module in (("autoencoder", autoencoder), ("prior", prior)):
        (run / name).mkdir(parents=True)
        weights = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(weights, run / name / "model.safetensors")
    (run / "config.json").write_text(to_json(experiment))
    return run
