"""A sweep's report from trials on disk: means over seeds, the best with its evidence and command, what failed."""

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distributed_inr.config import override, parse
from distributed_inr.presets import PRESETS
from distributed_inr.sweeps import report, study
from distributed_inr.sweeps.space import load_space, trial_name
from distributed_inr.sweeps.trial import Trial, Trials

PRESET = "furniture-image-short"


def sweep(folder: Path, one: study.Study) -> Trials:
    experiment = override(PRESETS[one.family][PRESET](), {"output": str(folder / "trials")})
    return Trials(experiment, load_space(one.space), one)


def write(folder: Path, trials: Trials, *, name: str = "bits", **changes: Any) -> Path:
    """The report of a sweep that was begun with these changes to the preset."""
    experiment = override(PRESETS[trials.study.family][PRESET](), changes)
    return report.write(folder, trials, sweep_name=name, preset=PRESET, experiment=experiment)


def write_trial(trials: Trials, values: dict[str, Any], seed: int = 0, *, samples: int = 100, **found: Any) -> None:
    trial = Trial(trial_name(values, seed), values, values, seed, **({"status": "finished"} | found))
    trials.record(trial)
    folder = trials.folder(trial.name)
    (folder / "autoencoder").mkdir()
    (folder / "autoencoder" / "metrics.jsonl").write_text(json.dumps({"samples": samples}) + "\n")


def bits(trials: Trials, number: int, seed: int, kid: float, deviation: float, **found: Any) -> None:
    measures = {"kid": kid, "kid_standard_error": 0.04, "psnr": 20.0, "deviation": deviation, "alone": 0.1}
    measures |= {f"deviation_{layer}": deviation + layer / 100 for layer in range(1, 6)}
    write_trial(trials, {"prior.condition_bits": number}, seed, measures=measures, **found)


@pytest.fixture
def condition_bits(tmp_path: Path) -> Path:
    trials = sweep(tmp_path, study.CONDITION_BITS)
    for seed, (eight, fifteen) in enumerate([(1.5, 1.2), (1.7, 1.3), (1.6, 1.4)]):
        bits(trials, 8, seed, eight, 0.9)
        bits(trials, 15, seed, fifteen, 0.5)
    write_trial(trials, {"prior.condition_bits": 99}, status="failed", error="Trace\nValueError: 99 are too many")
    return write(tmp_path, trials, **{"sampling.steps": 20, "prior.num_timesteps": 500})


def test_the_best_setting_is_named_with_its_evidence(condition_bits: Path):
    text = condition_bits.read_text()
    assert "**prior.condition_bits = 15**, 1.3 ± 0.1 over 3 seeds." in text
    # means 1.3 and 1.6 with deviations of 0.1 over three seeds: 0.3 / sqrt(2 x 0.1^2 / 3) = 3.67
    assert (
        "Next: prior.condition_bits = 8, 1.6 ± 0.1; the difference is 0.3, 3.7 standard errors of the means over seeds."
        in text
    )
    assert "| 8 | 3 finished | 1.6 ± 0.1 |" in text
    assert "**Failed**: condition_bits=99,seed=0: ValueError: 99 are too many" in text


def test_the_best_setting_is_a_command_that_makes_it(condition_bits: Path):
    (line,) = [line for line in condition_bits.read_text().splitlines() if line.startswith("python ")]
    words = shlex.split(line)
    assert words[:3] == ["python", "jobs/train_chinr.py", PRESET]
    experiment = parse(words[2:], PRESETS["chinr"], default="", description="")
    wanted = {"prior.condition_bits": 15, "sampling.steps": 20, "prior.num_timesteps": 500, "name": "bits-best"}
    assert experiment == override(PRESETS["chinr"][PRESET](), wanted)


def test_the_command_switches_kinds_and_holds_what_flags_cannot_simply_say(tmp_path: Path):
    trials = sweep(tmp_path, study.BETA_Z)
    values = {"prior.denoiser.kind": "unet", "prior.denoiser.multipliers": [1, 2], "prior_training.optim.lr": 1e-3}
    write_trial(trials, values, measures={"kid": 1.0})
    changes = {"prior.denoiser.width": 16, "prior.timestep_logit": (-1e-05, 0.5), "data.val": None}
    path = write(tmp_path, trials, name="kinds", **changes)
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("python ")]
    experiment = parse(shlex.split(line)[2:], PRESETS["ddmi"], default="", description="")
    assert experiment == override(override(PRESETS["ddmi"][PRESET](), changes), values | {"name": "kinds-best"})


def test_table_2_stands_beside_the_papers(condition_bits: Path):
    text = condition_bits.read_text()
    assert "| 15 | ours | 0.51 ± 0 | 0.52 ± 0 |" in text
    assert "| 15 | paper | 0.7766 | 0.5344 | 0.5478 | 0.3257 | 0.2570 |" in text
    assert "| 99 | paper" not in text


def test_all_trials_are_in_the_csv(condition_bits: Path):
    rows = list(csv.DictReader((condition_bits.parent / "trials.csv").read_text().splitlines()))
    assert len(rows) == 7 and {row["status"] for row in rows} == {"finished", "failed"}
    (one,) = [row for row in rows if row["trial"] == "condition_bits=15,seed=2"]
    assert float(one["kid"]) == 1.4 and one["seed"] == "2" and one["autoencoder_samples"] == "100"
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert failed["error"] == "ValueError: 99 are too many" and failed["kid"] == ""


def test_figures_show_every_measure(condition_bits: Path):
    picture = np.array(Image.open(condition_bits.parent / "measures.png").convert("RGB")).astype(int)
    blue = (abs(picture - (31, 119, 180)).sum(2) < 40).sum(0)  # of the curves, by column
    assert all(part.sum() > 50 for part in np.array_split(blue, 3))  # three panels
    assert "![measures](measures.png)" in condition_bits.read_text()


def test_trials_stopped_early_are_counted_with_what_they_were_worth(tmp_path: Path):
    trials = sweep(tmp_path, study.NUM_EXPERTS)
    write_trial(trials, {"autoencoder.num_experts": 64}, measures={"psnr": 20.0}, samples=900)
    write_trial(trials, {"autoencoder.num_experts": 8}, status="stopped", early=[[100.0, 12.5]], samples=100)
    text = write(tmp_path, trials, name="experts").read_text()
    assert "**autoencoder.num_experts = 64**, 20 over 1 seed." in text and "Nothing to compare it with." in text
    assert "num_experts=8,seed=0: 12.5 (psnr)" in text and "1,000 samples (autoencoder)" in text
    assert "| 8 | 1 stopped |" in text


def test_fewer_is_better_of_distances_and_more_of_psnr(tmp_path: Path):
    trials = sweep(tmp_path, study.NUM_EXPERTS)
    for number, psnr in ((8, 18.0), (16, 19.0), (32, 18.5)):
        write_trial(trials, {"autoencoder.num_experts": number}, measures={"psnr": psnr})
    text = write(tmp_path, trials, name="experts").read_text()
    assert "**autoencoder.num_experts = 16**" in text and "Next: autoencoder.num_experts = 32, 18.5;" in text


def test_a_sweep_of_which_nothing_finished_says_why(tmp_path: Path):
    trials = sweep(tmp_path, study.CONDITION_BITS)
    write_trial(trials, {"prior.condition_bits": 8}, status="failed", error="no space in runs")
    with pytest.raises(
        RuntimeError, match=r"no trial has finished; the first to fail was .*=8,seed=0: no space in runs"
    ):
        write(tmp_path, trials)
    assert (tmp_path / "trials.csv").exists()


def test_settings_with_conditions_share_one_table(tmp_path: Path):
    trials = sweep(tmp_path, study.BETA_Z)
    measures = {"kid": 1.0, "kl": 300.0, "psnr": 24.0}
    write_trial(trials, {"prior.denoiser.kind": "mlp", "prior.denoiser.width": 256}, measures=measures)
    write_trial(
        trials, {"prior.denoiser.kind": "unet", "prior.denoiser.channels": 32}, measures=measures | {"kid": 2.0}
    )
    path = write(tmp_path, trials, name="denoiser")
    text = path.read_text()
    assert "| prior.denoiser.kind | prior.denoiser.width | prior.denoiser.channels | trials |" in text
    assert "| mlp | 256 |  | 1 finished | 1 |" in text and "| unet |  | 32 | 1 finished | 2 |" in text
    assert (tmp_path / "curves.png").exists()


def test_a_seed_that_failed_counts_neither_as_measured_nor_as_sure(tmp_path: Path):
    trials = sweep(tmp_path, study.CONDITION_BITS)
    bits(trials, 8, 0, 1.0, 0.9)
    for seed in (1, 2):
        write_trial(trials, {"prior.condition_bits": 8}, seed, status="failed", error="out of memory")
    for seed, kid in enumerate((1.2, 1.3, 1.4)):
        bits(trials, 15, seed, kid, 0.5)
    text = write(tmp_path, trials).read_text()
    assert "**prior.condition_bits = 8**, 1 over 1 seed." in text
    # 0.3 over the root of 0.04^2, the single one's own, and 0.1^2 / 3, of the means over seeds: 4.27
    assert "the difference is 0.3, 4.3 standard errors of kid, with one seed." in text
    assert "| 8 | 1 finished, 2 failed | 1 |" in text


def test_where_chance_is_not_known_the_report_says_so(tmp_path: Path):
    trials = sweep(tmp_path, study.NUM_EXPERTS)
    for seed, psnr in enumerate((19.0, 19.2, 19.1)):
        write_trial(trials, {"autoencoder.num_experts": 64}, seed, measures={"psnr": psnr})
    write_trial(trials, {"autoencoder.num_experts": 8}, measures={"psnr": 18.0})
    assert "how much chance there is in it is not known" in write(tmp_path, trials, name="experts").read_text()
