"""The stages of a run: what is made, skipped, refused; and the run folder."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_processes
from tiny_run import tiny_experiment, write_pictures, write_run

from distributed_inr import pipeline
from distributed_inr.config import override
from distributed_inr.data.reader import evaluation_stream, read_latent
from distributed_inr.experiment import Experiment
from distributed_inr.generation import load
from distributed_inr.latents import LatentShards, write_latents
from distributed_inr.launch import Worker, launcher
from distributed_inr.run_folder import Stage, settle_output

FAST = {
    "scale.launcher": "none",
    "scale.engine": "accelerate",
    "scale.num_threads": 1,
    "data.num_streams": 4,
    "autoencoder_training.batch_size": 4,
    "prior_training.batch_size": 4,
    "prior_training.checkpoint_every_samples": 4,
    "evaluation.num_samples": 4,
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A complete run of 33 training pictures and 5 held out."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_pictures(folder / "train", 33, seed=1)
    write_pictures(folder / "val", 5, seed=2)
    experiment = override(tiny_experiment(folder), FAST)
    made = pipeline.run(experiment)
    assert made["run"] == experiment.folder
    return experiment


def written(folder: Path) -> dict[str, int]:
    return {
        str(p): p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (".lock", "config.json")
    }


def test_a_run_makes_all_that_the_run_folder_holds(experiment: Experiment):
    folder = experiment.folder
    for name in ("autoencoder", "prior"):
        assert {"model.safetensors", "metrics.jsonl", "checkpoints", "tensorboard", "stage.json", "log.txt"} <= {
            path.name for path in (folder / name).iterdir()
        }
    course = json.loads((folder / "evaluation.json").read_text())["samples"]["kid_efficientnet_lite0_by_checkpoint"]
    assert [entry["samples_seen"] for entry in course] == [4, 8]
    assert {"config.json", "evaluation.json", "report.md", "reconstructions.png", "neighbours.png"} <= {
        path.name for path in folder.iterdir()
    }
    assert load(folder).experiment == experiment
    assert load(folder).sample(2).render(8).shape == (2, 3, 8, 8)


def test_a_complete_run_is_skipped(experiment: Experiment):
    before = written(experiment.folder)
    pipeline.run(experiment)
    assert written(experiment.folder) == before


def test_how_fast_and_how_often_may_change_on_a_complete_run(experiment: Experiment):
    before = written(experiment.folder)
    changes = {
        "scale.zero_stage": 2,
        "autoencoder_training.batch_size": 8,
        "autoencoder_training.checkpoint_every_samples": 4,
        "prior_training.log_every_samples": 4,
        "prior_training.micro_batch_size": 3,
        "prior_training.keep_checkpoints": 5,
        "sampling.batch_size": 2,
        "data.num_loaders": 1,
    }
    pipeline.run(override(experiment, changes))
    assert written(experiment.folder) == before


@pytest.mark.parametrize(
    ("path", "value", "stage"),
    [
        ("autoencoder.kl_weight", 0.5, "autoencoder"),
        ("autoencoder_training.optim.lr", 0.5, "autoencoder"),
        ("data.shuffle_shards", 3, "autoencoder"),
        ("domain.flip", False, "autoencoder"),
        ("autoencoder.decoder_channels", 4, "autoencoder"),
        ("prior.num_timesteps", 500, "prior"),
        ("prior_training.num_samples", 12, "prior"),
    ],
)
def test_fault_36_other_architecture_or_options(experiment: Experiment, path: str, value: float, stage: str):
    """going on with another architecture, data order or schedule: refused with the fields that differ."""
    before = written(experiment.folder)
    with pytest.raises(ValueError, match=rf"/{stage} was made with other options: {path} is .* there and {value} here"):
        pipeline.run(override(experiment, {path: value}))
    assert written(experiment.folder) == before


def test_fault_37_other_training_data(experiment: Experiment, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """going on with other data: refused by their fingerprint, unless data.accept_changed says to go on."""
    write_pictures(tmp_path / "train", 33, seed=3)
    before = written(experiment.folder)
    changed = override(experiment, {"data.train": str(tmp_path / "train")})
    with pytest.raises(
        ValueError, match=r"was made from other inputs \(train\).*accept other data: --data.accept-changed"
    ):
        pipeline.run(changed)
    pipeline.run(override(changed, {"data.accept_changed": True}))
    assert "was made from other data, which are accepted" in caplog.text
    assert written(experiment.folder) == before


def test_other_ways_to_evaluate_are_evaluated_again(experiment: Experiment):
    evaluation = experiment.folder / "evaluation.json"
    before = evaluation.stat().st_mtime_ns, (experiment.folder / "prior" / "model.safetensors").stat().st_mtime_ns
    pipeline.run(override(experiment, {"sampling.count": 3}))
    after = evaluation.stat().st_mtime_ns, (experiment.folder / "prior" / "model.safetensors").stat().st_mtime_ns
    assert after[0] > before[0] and after[1] == before[1]
    pipeline.run(experiment)


def test_latents_hold_every_picture_and_its_mirror_image_once(experiment: Experiment):
    index = experiment.data.index(str(experiment.folder / "latents"))
    latents = experiment.data.dataset(index, read=read_latent, seed=0)
    found = {}
    for number in range(len(latents)):
        signal, _ = latents.signal(number)
        found[signal.key] = signal.inputs
    keys = [f"{number:04d}" for number in range(33)]
    assert sorted(found) == sorted(keys + [f"{key}#1" for key in keys]) and len(latents) == 66

    model = load(experiment.folder)
    data = experiment.dataset(experiment.data.index(experiment.data.train))
    for batch in evaluation_stream(data, batch=4):
        for copy, signal in enumerate(experiment.domain.copies(batch)):
            expected = torch.stack(model.autoencoder.posterior(signal), dim=1)
            for key, latent in zip(batch.key, expected, strict=True):
                torch.testing.assert_close(found[f"{key}#{copy}" if copy else key], latent, rtol=2e-3, atol=2e-3)


def test_statistics_are_those_of_drawn_latents(experiment: Experiment):
    folder = experiment.folder / "latents"
    latents = experiment.data.dataset(experiment.data.index(str(folder)), read=read_latent, seed=0)
    inputs = torch.stack([latents.signal(number)[0].inputs for number in range(len(latents))]).double()
    mean, deviation = inputs.unbind(1)  # [samples, channels, height, width]
    variance = ((mean - mean.mean((0, 2, 3), keepdim=True)) ** 2 + deviation**2).mean((0, 2, 3))
    statistics = json.loads((folder / "statistics.json").read_text())
    np.testing.assert_allclose(np.ravel(statistics["mean"]), mean.mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.ravel(statistics["deviation"]), variance.sqrt(), rtol=1e-9)
    prior = load(experiment.folder).prior
    assert prior is not None
    torch.testing.assert_close(prior.latent_deviation.flatten().double(), variance.sqrt(), rtol=1e-6, atol=0)


def write_share_of_latents(folder: Path, experiment: Experiment) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    worker = Worker(rank, world, lambda metrics: None, lambda *state: None, lambda: False)
    index = experiment.data.index(experiment.data.train)
    shards = LatentShards.of(experiment, index, experiment.autoencoder.build(experiment.domain))
    write_latents(worker, experiment=experiment, stage=Stage(folder, {}), shards=shards)


@pytest.mark.slow
def test_latents_do_not_depend_on_the_number_of_workers(tmp_path: Path):
    write_run(tmp_path)
    write_pictures(tmp_path / "train", 70, seed=1)
    experiment = tiny_experiment(tmp_path)
    fingerprints = []
    for world in (1, 2):
        stage = Stage(tmp_path / f"latents-{world}", {})
        stage.begin({})
        run_processes(write_share_of_latents, world, stage.folder, experiment)
        index = experiment.data.index(str(stage.folder))
        assert len(index.shards) == 3 and index.num_samples == 140
        fingerprints.append(index.fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_a_run_that_will_not_fit_the_disk_is_refused_at_the_start(experiment: Experiment):
    before = written(experiment.folder)
    changes = {"prior_training.keep_checkpoints": 10**12}
    with pytest.raises(ValueError, match=r"no space in .*GB are needed .*prior .* are free; free some"):
        pipeline.run(override(experiment, changes))
    assert written(experiment.folder) == before


def test_an_output_that_cannot_be_written_is_refused(experiment: Experiment, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write to .*file/ddmi/tiny: .*; choose another place"):
        pipeline.run(override(experiment, {"output": str(tmp_path / "file")}))


def test_an_object_store_is_refused_as_output(experiment: Experiment):
    with pytest.raises(ValueError, match="output='s3://bucket/runs' is an object store"):
        pipeline.run(override(experiment, {"output": "s3://bucket/runs"}))


def test_a_relative_output_inside_a_ray_job_is_refused(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match=r"output='my-runs' is relative: inside a Ray job.*~/distributed_inr/runs"):
        pipeline.run(override(experiment, {"output": "my-runs"}))


def test_without_an_output_a_ray_job_writes_to_the_home_folder(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    settled = settle_output(override(experiment, {"output": "./runs"}), shared=True)
    assert settled.folder == tmp_path / "distributed_inr" / "runs" / "ddmi" / "tiny"
    assert settle_output(override(experiment, {"output": "./runs"}), shared=False).output == "./runs"


def test_what_does_not_fit_is_refused_before_anything_is_trained(experiment: Experiment, tmp_path: Path):
    changes = {"output": str(tmp_path), "prior.denoiser.multipliers": (1, 1, 1, 1)}
    with pytest.raises(ValueError, match="use fewer levels"):
        pipeline.run(override(experiment, changes))
    with pytest.raises(ValueError, match="domain.source_size=64; prepare the data at that size"):
        pipeline.run(override(experiment, {"output": str(tmp_path), "domain.source_size": 64}))
    with pytest.raises(ValueError, match="holds a set of latent, domain.kind=image"):
        latents = str(experiment.folder / "latents")
        pipeline.run(override(experiment, {"output": str(tmp_path), "data.train": latents}))
    assert list(tmp_path.iterdir()) == []


def test_batches_that_the_workers_cannot_share_are_refused_before_the_first_stage(
    experiment: Experiment, tmp_path: Path
):
    changed = override(experiment, {"output": str(tmp_path), "prior_training.micro_batch_size": 3})
    with pytest.raises(ValueError, match=r"^prior_training.batch_size=4 must be a multiple of .* 1 \* 3 = 3; try 6$"):
        pipeline.run(changed)
    assert not (changed.folder / "autoencoder").exists()


def test_an_interrupted_stage_goes_on_from_its_checkpoint(experiment: Experiment, tmp_path: Path):
    changes = {"output": str(tmp_path), "autoencoder_training.checkpoint_every_samples": 4}
    cut = override(experiment, changes)
    stage = Stage(cut.folder / "autoencoder", {})

    def stop_at_once(worker: Worker) -> None:
        pipeline.fit_autoencoder(dataclasses.replace(worker, stop=lambda: True), experiment=cut, stage=stage)

    stage.folder.mkdir(parents=True)
    stage.begin({})
    with launcher(cut.scale) as place:  # with as many threads as the whole run had, or the last bits may differ
        place.run(stop_at_once, title="interrupted", folder=stage.folder)
    assert not (stage.folder / "model.safetensors").exists()
    (stage.folder / "stage.json").unlink()

    pipeline.run(cut)
    for name in ("autoencoder/model.safetensors", "prior/model.safetensors"):
        assert (cut.folder / name).read_bytes() == (experiment.folder / name).read_bytes()


def test_a_run_takes_another_runs_autoencoder_and_trains_a_prior_of_its_own(experiment: Experiment):
    before = written(experiment.folder)
    changes = {"name": "other", "seed": 1, "autoencoder_training.num_samples": 999}  # which does not matter here
    other = override(experiment, {**changes, "autoencoder_from": str(experiment.folder)})
    pipeline.run(other)
    assert written(experiment.folder) == before
    for name in ("autoencoder", "latents"):
        assert (other.folder / name).is_symlink() and (other.folder / name).samefile(experiment.folder / name)
    one, two = (json.loads((e.folder / "evaluation.json").read_text()) for e in (experiment, other))
    assert one["val"] == two["val"] and one["samples"] != two["samples"]
    again = written(other.folder)
    pipeline.run(other)
    assert written(other.folder) == again
    third = override(other, {"name": "third", "autoencoder_from": str(other.folder)})  # a borrower
    for _ in range(2):
        pipeline.run(third)
    assert (third.folder / "latents").samefile(experiment.folder / "latents")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder_from": "nowhere"}, r"nowhere.autoencoder is not finished; give the folder of a run"),
        ({"autoencoder.readout_width": 24}, r"other options: autoencoder.readout_width is 16 there and 24 here"),
        ({"name": "tiny"}, r"but .*tiny.autoencoder is there already; delete it, choose another --name, or leave"),
    ],
)
def test_an_autoencoder_that_cannot_be_taken_is_refused(
    experiment: Experiment, changes: dict[str, object], message: str, tmp_path: Path
):
    place = {"name": "taker", "output": experiment.output if "name" in changes else str(tmp_path)}
    source = tmp_path / "source"
    if "name" in changes:  # of another run
        (source / "autoencoder").mkdir(parents=True)
        (source / "latents").mkdir()
        for name in ("autoencoder", "latents"):
            (source / name / "stage.json").write_text((experiment.folder / name / "stage.json").read_text())
    default = {"autoencoder_from": str(source if "name" in changes else experiment.folder)}
    with pytest.raises(ValueError, match=message):
        pipeline.run(override(experiment, place | default | changes))


def test_stages_that_are_not_asked_for_are_left_and_metrics_are_passed_on(experiment: Experiment, tmp_path: Path):
    alone = override(experiment, {"output": str(tmp_path), "autoencoder_training.checkpoint_every_samples": 4})
    seen: list[dict] = []
    pipeline.run(alone, stages=("autoencoder", "evaluation"), observe=seen.append)
    assert [metrics["samples"] for metrics in seen] == [4, 8]
    assert "val/reconstruction" in seen[-1] and Path(seen[-1]["checkpoint"]).is_dir()
    assert not (alone.folder / "latents").exists() and not (alone.folder / "prior").exists()
    result = json.loads((alone.folder / "evaluation.json").read_text())
    assert "psnr" in result["val"] and "samples" not in result
    pipeline.run(alone)
    assert "samples" in json.loads((alone.folder / "evaluation.json").read_text())
