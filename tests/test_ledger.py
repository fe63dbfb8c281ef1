"""The sample ledger: what it proves, and what it finds where something is wrong."""

import functools
from pathlib import Path

import pytest
from fault_runs import BATCH, fit, make_experiment, stage_of
from test_jobs import run_here

from distributed_inr.config import override
from distributed_inr.experiment import Experiment
from distributed_inr.launch import launcher
from distributed_inr.run_folder import Stage
from distributed_inr.training import ledger


def write_attempt(folder: Path, number: int, start: int, ranks: list[list[str]]) -> None:
    attempt = folder / f"{number:05d}-from-{start:012d}"
    attempt.mkdir(parents=True)
    for rank, lines in enumerate(ranks):
        (attempt / f"rank-{rank:05d}-of-{len(ranks):05d}.tsv").write_text("".join(lines))


def seen(*positions: int, outcome: str = "applied") -> list[str]:
    return [f'{position}\t"sample-{position % 5}"\t{outcome}\n' for position in positions]


def account(folder: Path, num_samples: int = 12) -> ledger.Account:
    return ledger.check(
        folder, num_samples=num_samples, key=lambda position: f"sample-{position % 5}", max_bad_fraction=0.01
    )


def test_steps_that_a_kill_undid_count_once(tmp_path: Path):
    write_attempt(tmp_path, 0, 0, [seen(0, 2, 4, 6), [*seen(1, 3, 5), '7\t"samp']])
    write_attempt(tmp_path, 1, 4, [seen(*range(4, 8))])
    write_attempt(tmp_path, 2, 8, [seen(8, 10), seen(9, 11, outcome="skipped")])
    found = account(tmp_path)
    assert (found.num_attempts, found.num_redone, found.num_unapplied) == (3, 3, 2) and found.problems == []
    assert str(found).startswith("12 positions: 0 lost, 0 repeated, 0 of another sample")


def test_a_later_restart_from_an_older_checkpoint_undoes_more(tmp_path: Path):
    write_attempt(tmp_path, 0, 0, [seen(*range(8))])
    write_attempt(tmp_path, 1, 8, [seen(*range(8, 12))])
    write_attempt(tmp_path, 2, 4, [seen(*range(4, 12))])
    assert account(tmp_path).problems == [] and account(tmp_path).num_redone == 8


def test_lost_repeated_and_other_samples_are_named(tmp_path: Path):
    write_attempt(tmp_path, 0, 0, [[*seen(0, 1, 2, 2, 4, 5, 6, 7, 8, 9, 10), '11\t"sample-0"\tapplied\n']])
    found = account(tmp_path)
    assert (found.lost, found.repeated, found.other_keys) == ([3], [2], [11])
    assert found.problems == [
        "positions 3 were lost",
        "positions 2 were repeated",
        "positions 11 were of another sample than the order's, above data.max_bad_fraction=0.01",
    ]
    assert account(tmp_path, 15).lost == [3, 12, 13, 14]


def test_a_ledger_that_begins_late_accuses_nobody(tmp_path: Path):
    write_attempt(tmp_path, 0, 8, [seen(*range(8, 12))])
    with pytest.raises(ValueError, match="begins at position 8: of those before nothing is known"):
        account(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    options = {"scale__launcher": "none", "scale__engine": "accelerate", "scale__num_threads": 1}
    experiment = make_experiment(tmp_path_factory.mktemp("ledger"), steps=9, name="run", **options)
    stage = stage_of(experiment)
    with launcher(experiment.scale) as place:
        place.run(functools.partial(fit, experiment=experiment), title="fit", folder=stage.folder, stoppable=True)
    return experiment


def check(monkeypatch: pytest.MonkeyPatch, run: Path) -> int:
    return run_here(monkeypatch, str(run), job="jobs/check_ledger.py")


def test_the_job_proves_a_finished_run(
    trained: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert check(monkeypatch, trained.folder) == 2
    assert "is not finished; train on with the command that began it" in capsys.readouterr().err
    Stage(trained.folder / "autoencoder", {}).finish({})
    assert check(monkeypatch, trained.folder) == 0
    assert f"autoencoder  {9 * BATCH} positions: 0 lost, 0 repeated, 0 of another" in capsys.readouterr().out

    (path,) = (trained.folder / "autoencoder" / "ledger").glob("*/*.tsv")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7] + lines[8:]))
    assert check(monkeypatch, trained.folder) == 2
    assert capsys.readouterr().err == "error: autoencoder: positions 7 were lost\n"


def test_a_run_without_a_ledger_is_refused(trained: Experiment, tmp_path: Path):
    from distributed_inr import pipeline
    from distributed_inr.config import to_json

    other = override(trained, {"autoencoder_training.ledger": False, "output": str(tmp_path)})
    other.folder.mkdir(parents=True)
    (other.folder / "config.json").write_text(to_json(other))
    with pytest.raises(ValueError, match="holds no ledger; train with --autoencoder-training.ledger true"):
        pipeline.check_ledgers(other.folder)
