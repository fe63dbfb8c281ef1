"""The first ten losses of the bundled presets, recorded: a change not meant to alter results leaves them as they are.

python tests/test_golden.py records them again, in a commit that says why.
"""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_inr.config import override, to_json
from distributed_inr.data.reader import read_latent
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.experiment import Experiment
from distributed_inr.presets import chinr, ddmi
from distributed_inr.training.loop import train

GOLDEN = Path(__file__).parent / "golden"
EXPERIMENTS = {"furniture-image": ddmi.furniture_image(), "furniture-image-chinr": chinr.furniture_image().settle(816)}
STEPS, BATCH = 10, 4


def losses(experiment: Experiment, folder: Path) -> dict[str, list[float]]:
    """Of the autoencoder on the bundled views, and of the prior on random latents; in float32, on one thread."""
    changes = {f"{stage}.{name}": BATCH for stage in STAGES for name in ("batch_size", "log_every_samples")}
    changes |= {f"{stage}.num_samples": STEPS * BATCH for stage in STAGES}
    changes |= {"scale.engine": "accelerate", "scale.precision": "float32", "scale.compile": False}
    experiment = override(experiment, changes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        autoencoder = experiment.autoencoder.build(experiment.domain)
        prior = experiment.prior.build(autoencoder.latent_shape)
        write_latents(folder / "latents", autoencoder.latent_shape)
        data = experiment.data
        sets = {
            "autoencoder_training": (autoencoder, experiment.dataset(data.index(data.train))),
            "prior_training": (prior, data.dataset(data.index(str(folder / "latents")), read=read_latent, seed=0)),
        }
        for stage, (module, dataset) in sets.items():
            train(
                module,
                dataset,
                training=getattr(experiment, stage),
                scale=experiment.scale,
                seed=0,
                folder=folder / stage,
                config_json=to_json(experiment),
            )
    finally:
        torch.set_num_threads(threads)
    lines = {stage: (folder / stage / "metrics.jsonl").read_text().splitlines() for stage in STAGES}
    return {stage: [json.loads(line)["train/total"] for line in lines[stage]] for stage in STAGES}


STAGES = ("autoencoder_training", "prior_training")


def write_latents(folder: Path, shape: tuple[int, ...]) -> None:
    writer = ShardWriter(folder, domain="latent", protocol={"made": "for tests"})
    for number in range(20):
        latent = np.random.default_rng(number).standard_normal((2, *shape)).astype(np.float16)
        file = io.BytesIO()
        np.save(file, np.stack([latent[0], np.abs(latent[1])]), allow_pickle=False)
        writer.write({"__key__": f"{number:02d}", "latent.npy": file.getvalue()})
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_first_losses_are_the_recorded_ones(name: str, tmp_path: Path):
    found = losses(EXPERIMENTS[name], tmp_path)
    for stage, recorded in json.loads((GOLDEN / f"{name}.json").read_text()).items():
        assert found[stage] == pytest.approx(recorded, rel=1e-4), stage  # other instruction sets round otherwise


if __name__ == "__main__":
    for name, experiment in EXPERIMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = losses(experiment, Path(folder))
        (GOLDEN / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
