"""Values that are not finite, on one rank: all ranks refuse the step alike, and then stop, skip it or roll back."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_runs import BATCH, fit, make_experiment, read_account, read_losses, read_weights, stage_of
from processes import run_processes

from distributed_inr.experiment import Experiment
from distributed_inr.launch import Worker

pytestmark = pytest.mark.slow

STEPS, BAD = 8, 17  # the second sample of the fifth step, which only the second of two ranks sees


def experiment_of(folder: Path, name: str) -> Experiment:
    """Its name begins with the policy; "cap" allows for two steps and meets more."""
    policy = name.split("-")[0]
    options: dict[str, Any] = {"max_nonfinite_steps": 2} if policy == "cap" else {}
    options["on_nonfinite"] = "skip" if policy == "cap" else policy
    training = {f"autoencoder_training__{key}": value for key, value in options.items()}
    return make_experiment(folder, steps=STEPS, name=name, **training)


def spoil(folder: Path, names: list[str], *, until: int | None = None) -> dict[str, Any]:
    """Train with a loss of NaN at BAD (or, under "cap", from there on); what went wrong and what was warned of."""
    from distributed_inr.models.d2c_vae import D2CVAEModel

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    forward, found = D2CVAEModel.forward, {}
    for name in names:

        def spoiled(module, batch):
            bad = batch.position >= BAD if name == "cap" else batch.position == BAD  # noqa: B023
            spoils = torch.where(bad.any() & module.training, torch.nan, 1.0)
            return {key: loss * spoils for key, loss in forward(module, batch).items()}

        warnings: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: warnings.append(record.getMessage())  # noqa: B023
        logging.getLogger("distributed_inr").addHandler(handler)
        D2CVAEModel.forward, error, seen = spoiled, "", [0]

        def progress(done: int, *rest: object) -> None:
            seen[0] = done  # noqa: B023

        worker = Worker(rank, world, lambda metrics: None, progress, lambda: until is not None and seen[0] >= until)  # noqa: B023
        try:
            fit(worker, experiment_of(folder, name))
        except FloatingPointError as problem:
            error = str(problem)
        finally:
            D2CVAEModel.forward = forward
            logging.getLogger("distributed_inr").removeHandler(handler)
        found[name] = {"error": error, "warnings": warnings}
    return found


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Runs under every policy: what each rank found."""
    folder = tmp_path_factory.mktemp("numerics")
    names = ["stop", "skip", "cap", "rollback", "rollback-resumed"]
    for name in names:
        stage_of(experiment_of(folder, name))
    ranks = run_processes(spoil, 2, folder, names[:-1])
    return folder, ranks


def read_state(experiment: Experiment) -> dict[str, Any]:
    newest = max((experiment.folder / "autoencoder" / "checkpoints").iterdir())
    return json.loads((newest / "state.json").read_text())


def test_fault_53_a_loss_that_is_not_finite_stops_the_run(ended: tuple[Path, list[dict[str, Any]]]):
    """NaN loss on one rank: all ranks refuse the step before the update, name its samples, and stop."""
    folder, ranks = ended
    first, second = (rank["stop"]["error"] for rank in ranks)
    assert first == second and first.startswith("step 5 is not finite and was not applied: ")
    key = "; samples "
    assert key in first and len(first.partition(key)[2].split(", ")) == 1  # the micro-batch has one sample
    assert read_state(experiment_of(folder, "stop"))["samples"] == 3 * BATCH


def test_fault_53_such_a_step_is_skipped_if_asked(ended: tuple[Path, list[dict[str, Any]]]):
    """NaN loss under the policy "skip": the run goes on without that step, counts and logs it."""
    folder, ranks = ended
    experiment = experiment_of(folder, "skip")
    assert ranks[0]["skip"]["error"] == ranks[1]["skip"]["error"] == "" and ranks[1]["skip"]["warnings"] == []
    (warning,) = ranks[0]["skip"]["warnings"]
    assert warning.startswith("step 5 is not finite") and warning.endswith("; skipped")
    state, account = read_state(experiment), read_account(experiment)
    assert (state["samples"], state["steps"], state["num_nonfinite"]) == (STEPS * BATCH, STEPS - 1, 1)
    assert account.lost == account.repeated == [] and account.num_unapplied == BATCH


def test_fault_53_skipping_has_a_cap(ended: tuple[Path, list[dict[str, Any]]]):
    """more NaN steps than max_nonfinite_steps: the run stops all the same."""
    folder, ranks = ended
    assert len(ranks[0]["cap"]["warnings"]) == 2
    assert ranks[0]["cap"]["error"].startswith("step 5 is not finite")
    assert "after max_nonfinite_steps=2 such steps" in ranks[0]["cap"]["error"]


def test_fault_53_such_a_step_rolls_back_if_asked(ended: tuple[Path, list[dict[str, Any]]]):
    """NaN loss under the policy "rollback": the checkpoint's weights, and on with the data after the step."""
    folder, ranks = ended
    experiment = experiment_of(folder, "rollback")
    (warning,) = ranks[0]["rollback"]["warnings"]
    assert warning.endswith(f"; rolled back to {3 * BATCH}")
    state, account = read_state(experiment), read_account(experiment)
    assert (state["samples"], state["steps"], state["num_nonfinite"]) == (STEPS * BATCH, STEPS - 2, 1)
    assert account.lost == account.repeated == [] and account.num_unapplied == BATCH


def test_fault_53_a_run_that_rolled_back_is_resumed_exactly(ended: tuple[Path, list[dict[str, Any]]]):
    """a stop after a roll-back: the run that goes on equals the one without the stop in every bit."""
    folder, _ = ended
    resumed = experiment_of(folder, "rollback-resumed")
    run_processes(spoil_until, 2, folder)
    assert 0 < read_state(resumed)["samples"] < STEPS * BATCH
    run_processes(spoil, 2, folder, ["rollback-resumed"])
    assert read_losses(resumed) == read_losses(experiment_of(folder, "rollback"))
    assert read_weights(resumed) == read_weights(experiment_of(folder, "rollback"))


def spoil_until(folder: Path) -> None:
    from distributed_inr.training import loop

    loop.PROGRESS_SECONDS = 0.0  # told of every step
    spoil(folder, ["rollback-resumed"], until=6 * BATCH)
