"""A CHINR run from data to evaluation, at tiny size."""

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_runs import Job, kill_jobs, read_losses, read_starts, read_weights
from processes import run_processes
from safetensors.torch import load_file
from test_pipeline import FAST
from tiny_chinr import chinr_experiment, write_chinr
from tiny_run import write_pictures

from distributed_inr import pipeline
from distributed_inr.config import override
from distributed_inr.data.reader import read_latent
from distributed_inr.domains import collate
from distributed_inr.experiment import Experiment
from distributed_inr.generation import load
from distributed_inr.latents import LatentShards, write_latents
from distributed_inr.models.hierarchical_diffusion import HierarchicalDiffusionModel
from distributed_inr.run_folder import Stage
from distributed_inr.worker import Worker


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A complete run of 33 training pictures and 5 held out; the number of condition bits is left open."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_pictures(folder / "train", 33, seed=1)
    write_pictures(folder / "val", 5, seed=2)
    experiment = override(chinr_experiment(folder), FAST | {"prior.condition_bits": None})
    pipeline.run(experiment)
    return experiment


def latents_of(experiment: Experiment) -> dict[str, tuple[torch.Tensor, dict]]:
    """By key: the written latent, and its .json."""
    index = experiment.data.index(str(experiment.folder / "latents"))
    found = {}
    raw = experiment.data.dataset(index, read=lambda record, seed: _with_json(record, seed), seed=0)
    for number in range(len(raw)):
        sample, good = raw.signal(number)
        assert good
        found[sample.key] = (sample.inputs[0], json.loads(sample.text))
    return found


def _with_json(record, seed):
    sample = read_latent(record, seed)
    return type(sample)(**{**sample.__dict__, "text": record["json"].decode()})


def test_a_run_makes_and_loads_all_its_parts(experiment: Experiment):
    model = load(experiment.folder)
    assert isinstance(model.prior, HierarchicalDiffusionModel)
    assert model.experiment.prior.condition_bits == 2  # floor(log2 33) - 3
    result = json.loads((experiment.folder / "evaluation.json").read_text())
    assert result["val"]["latent_numbers"] == 32 and result["val"]["signals"] == 5
    assert "kid_efficientnet_lite0" in result["samples"]
    assert (experiment.folder / "reconstructions.png").is_file()


def test_a_complete_run_is_skipped(experiment: Experiment):
    paths = [p for p in experiment.folder.rglob("*") if p.is_file() and p.name not in (".lock", "config.json")]
    before = {path: path.stat().st_mtime_ns for path in paths}
    pipeline.run(experiment)
    assert {path: path.stat().st_mtime_ns for path in paths} == before


def test_written_latents_are_the_fitted_ones_with_the_psnr_of_their_fit(experiment: Experiment):
    model = load(experiment.folder)
    dataset = experiment.dataset(experiment.data.index(experiment.data.train))
    written = latents_of(experiment)
    assert len(written) == 33
    for number in (0, 17, 32):
        sample = collate([dataset.signal(number)[0]])
        latent, about = written[sample.key[0]]
        fitted = model.autoencoder.encode(sample)
        torch.testing.assert_close(latent, fitted[0], rtol=1e-4, atol=1e-7)
        picture = model.decode(fitted).render(16) * 2 - 1
        unclipped = (model.decode(fitted)(*_grid(model)) - sample.inputs.flatten(2).transpose(1, 2)).square().mean()
        assert picture.shape == sample.inputs.shape
        assert about["psnr"] == pytest.approx(10 * np.log10(4 / unclipped.item()), abs=2e-3)


def _grid(model):
    centres = (torch.arange(16) * 2 + 1) / 16 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return (torch.stack([x, y], dim=-1).view(1, -1, 2),)


def test_statistics_are_of_each_number_of_each_layer(experiment: Experiment):
    latents = torch.stack([latent for latent, _ in latents_of(experiment).values()]).double()
    model = load(experiment.folder)
    prior = model.prior
    assert isinstance(prior, HierarchicalDiffusionModel)
    torch.testing.assert_close(prior.latent_mean.double(), latents.mean(0), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(prior.latent_deviation.double(), latents.std(0, correction=0), rtol=1e-3, atol=1e-8)
    scores = prior.normalise(latents.float())
    torch.testing.assert_close(scores.std(0, correction=0), torch.ones(4, 8), rtol=1e-3, atol=1e-3)
    statistics = json.loads((experiment.folder / "latents" / "statistics.json").read_text())
    fits = [about["psnr"] for _, about in latents_of(experiment).values()]
    assert statistics["psnr"] == pytest.approx(np.mean(fits), abs=1e-3)


def test_latents_of_another_autoencoder_are_refused(experiment: Experiment, tmp_path: Path):
    other = override(experiment, {"output": str(tmp_path), "seed": 1})
    pipeline.run(override(other, {"prior_training.num_samples": 4}))
    shutil.rmtree(other.folder / "latents")
    shutil.rmtree(other.folder / "prior")
    shutil.copytree(experiment.folder / "latents", other.folder / "latents")
    stage = json.loads((other.folder / "latents" / "stage.json").read_text())
    weights = (other.folder / "autoencoder" / "model.safetensors").read_bytes()

    stage["inputs"]["autoencoder"] = hashlib.sha256(weights).hexdigest()  # as a hasty person would make it pass
    (other.folder / "latents" / "stage.json").write_text(json.dumps(stage))
    with pytest.raises(ValueError, match=r"latents of another autoencoder \(sha256 [0-9a-f]{12}, .* has "):
        pipeline.run(override(other, {"prior_training.num_samples": 4}))


def test_a_folded_network_is_not_trained(experiment: Experiment):
    folded = override(experiment, {"autoencoder.folded": True, "name": "folded"})
    with pytest.raises(ValueError, match="autoencoder.folded=True holds a trained network's weights"):
        pipeline.run(folded)
    assert not folded.folder.exists()


def test_a_condition_longer_than_the_latents_is_refused_before_training(experiment: Experiment, tmp_path: Path):
    wrong = override(experiment, {"output": str(tmp_path), "prior.condition_bits": 25})
    with pytest.raises(ValueError, match=r"prior\.condition_bits=25 must be at most 24, the numbers of the 3 latents"):
        pipeline.run(wrong)
    assert not wrong.folder.exists()


def write_share_of_latents(folder: Path, experiment: Experiment) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    worker = Worker(rank, world, lambda metrics: None, lambda *state: None, lambda: False)
    index = experiment.data.index(experiment.data.train)
    shards = LatentShards.of(experiment, index, experiment.autoencoder.build(experiment.domain))
    write_latents(worker, experiment=experiment, stage=Stage(folder, {}), shards=shards)


@pytest.mark.slow
def test_latents_do_not_depend_on_the_number_of_workers(tmp_path: Path):
    write_chinr(tmp_path)
    write_pictures(tmp_path / "train", 70, seed=1)
    experiment = chinr_experiment(tmp_path)
    found = []
    for world in (1, 2):
        stage = Stage(tmp_path / f"latents-{world}", {})
        stage.begin({})
        run_processes(write_share_of_latents, world, stage.folder, experiment)
        index = experiment.data.index(str(stage.folder))
        dataset = experiment.data.dataset(index, read=read_latent, seed=0)
        found.append({s.key: s.inputs for s in (dataset.signal(i)[0] for i in range(len(dataset)))})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 70
    for key, latent in found[0].items():
        torch.testing.assert_close(found[1][key], latent, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_meta_learning_that_is_killed_goes_on_and_ends_equal_in_every_bit(tmp_path: Path):
    """kill -9 in training: the same losses and weights as of a run without a kill, learned rates included."""
    fitting = {"kind": "meta-learning", "rates": "learned", "num_points": 16, "chunk": 3}
    sizes = {"num_layers": 3, "num_experts": 4, "width": 8, "latent_dim": 4, "num_points": 16}
    settings: dict[str, Any] = {
        "steps": 120,
        "family": "chinr",
        "autoencoder": {"kind": "layers-of-experts", **sizes, "fitting": fitting},
        "autoencoder_training__checkpoint_every_samples": 40,
        "scale__launcher": "none",
        "scale__num_threads": 1,
    }
    try:
        whole = Job(tmp_path, name="whole", **settings)
        whole.finish()
        job = Job(tmp_path, name="killed", **settings)
        job.wait_until(lambda: job.num_lines >= 40)
        job.stop(signal.SIGKILL)
        assert job.process.returncode == -signal.SIGKILL and 0 < job.samples_kept < 480
        kept = job.samples_kept
        job = Job(tmp_path, name="killed", **settings)
        job.finish()
    finally:
        kill_jobs()
    assert read_starts(job.experiment) == [0, kept]
    assert read_losses(job.experiment) == read_losses(whole.experiment)
    assert read_weights(job.experiment) == read_weights(whole.experiment)
    assert "rates" in load_file(job.experiment.folder / "autoencoder" / "model.safetensors")
