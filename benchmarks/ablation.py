"""Table 8 of DDMI on the bundled pictures: one basis field, three concatenated (HDBF), three coarse to fine (CFC).

python benchmarks/ablation.py [--samples 8000] [--seeds 0 1 2]

Fits the quick start's autoencoder with each conditioning and seed on equally many samples, in this process, and prints
the held-out PSNR of posterior means at 64 pixels. Paper, on its own data: 32.72, 33.17 and 33.56 dB.
"""

import argparse
import functools
import statistics
import tempfile

import torch

from distributed_inr.config import override, to_json
from distributed_inr.evaluation import metrics
from distributed_inr.evaluation.splits import Split
from distributed_inr.experiment import Experiment
from distributed_inr.generation import load
from distributed_inr.launch import launcher
from distributed_inr.pipeline import fit_autoencoder
from distributed_inr.presets.ddmi import furniture_image
from distributed_inr.run_folder import Stage

CONDITIONINGS = ("single", "concatenate", "coarse-to-fine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8000, help="samples that each fit sees")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of weights, data and noise")
    given = parser.parse_args()
    print(f"quick start's autoencoder, {given.samples} samples, torch {torch.__version__}", flush=True)
    found: dict[str, list[float]] = {conditioning: [] for conditioning in CONDITIONINGS}
    for seed in given.seeds:
        for conditioning in CONDITIONINGS:
            with tempfile.TemporaryDirectory() as folder:
                changes = {
                    "seed": seed,
                    "output": folder,
                    "autoencoder.conditioning": conditioning,
                    "autoencoder.kl_anneal_samples": given.samples * 9 // 10,
                    "autoencoder_training.num_samples": given.samples,
                    "autoencoder_training.checkpoint_every_samples": None,
                    "scale.launcher": "none",
                    "scale.engine": "accelerate",
                }
                found[conditioning].append(held_out_psnr(override(furniture_image(), changes)))
            print(f"seed {seed}  {conditioning:15} {found[conditioning][-1]:6.2f} dB", flush=True)
    for conditioning, values in found.items():
        print(f"mean    {conditioning:15} {statistics.fmean(values):6.2f} dB")


def held_out_psnr(experiment: Experiment) -> float:
    """Fit the autoencoder and measure it, in dB."""
    experiment.folder.mkdir(parents=True)
    (experiment.folder / "config.json").write_text(to_json(experiment))
    stage = Stage(experiment.folder / "autoencoder", {})
    stage.begin({})
    fit = functools.partial(fit_autoencoder, experiment=experiment, stage=stage)
    with launcher(experiment.scale) as place:
        place.run(fit, title=experiment.autoencoder.conditioning, folder=stage.folder)
    model = load(experiment.folder)
    assert experiment.data.val is not None
    split = Split(model, experiment.data.val)
    values = [
        metrics.psnr(model.encode(signal).render(experiment.domain.size), (signal.inputs + 1) / 2)
        for signal in split.batches(split.spread(1000))
    ]
    return torch.cat(values).mean().item()


if __name__ == "__main__":
    main()
