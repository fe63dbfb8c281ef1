"""Plans of presets, of data at hand and of the command: what they tell, refuse and advise."""

import subprocess
import sys

import pytest
import torch
from test_jobs import run_here
from test_plan import MICRO, tiny
from tiny_run import tiny_experiment, write_pictures

from distributed_inr.config import override
from distributed_inr.data.order import Order
from distributed_inr.domains.domain import collate
from distributed_inr.latents import LatentShards
from distributed_inr.pipeline import training_bytes
from distributed_inr.plan import make_signals, plan, presets
from distributed_inr.presets import PRESETS


@pytest.mark.parametrize(
    ("path", "autoencoder", "prior"),
    [
        ("ddmi/afhqv2-cat-256", 56.9, 519.2),  # published: 57.2 + 1.9, another read-out, and 519
        ("ddmi/celebahq-256", 69.3, 1015.0),  # 69.6 + 1.9, and 1,015
        ("chinr/celebahq-64", 32.3, None),  # 32.346
    ],
)
def test_the_papers_presets_have_the_papers_numbers_of_parameters(path, autoencoder, prior):
    found = plan(presets()[path](), num_workers=8)
    first, second = found.trainings
    assert round(first.num_parameters / 1e6, 1) == autoencoder
    assert prior is None or round(second.num_parameters / 1e6, 1) == prior
    if path == "chinr/celebahq-64":
        assert round(first.num_parameters / 1e6, 3) == 32.346
        assert "1,048,576 signals are assumed where the prior's size depends on their number" in found.notes


@pytest.mark.slow
def test_a_large_model_is_planned_without_its_memory():
    code = (
        "import resource, distributed_inr.plan as p\n"
        "from distributed_inr.presets.ddmi import celebahq_64, celebahq_256\n"
        "p.plan(celebahq_64(), num_workers=8)\n"  # what must be imported is
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = p.plan(celebahq_256(), num_workers=8)\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(found.trainings[1].memory[0].held.weights // 2**20, grown // 2**10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    weights, grown = map(int, done.stdout.split())
    assert weights > 3800 and grown < 100, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", [f"{family}/{name}" for family in PRESETS for name in PRESETS[family]])
def test_every_preset_can_be_planned(path):
    found = plan(presets()[path]())
    assert [training.needed > 0 for training in found.trainings] == [True, True]
    assert max(map(len, str(found).split("note:")[0].splitlines())) <= 120


@pytest.mark.parametrize(("world", "workers_per_node"), [(1, 1), (4, 2), (6, 3), (5, 1)])
def test_shards_that_are_read_are_those_of_the_order(world, workers_per_node):
    experiment = override(tiny("ddmi"), {"data.num_streams": 8, "data.shuffle_shards": 2, "seed": 3})
    batch = {f"{name}_training.batch_size": world * MICRO for name in ("autoencoder", "prior")}
    experiment = override(experiment, batch)
    found = plan(
        experiment,
        num_workers=world,
        workers_per_node=workers_per_node,
        device="cpu",
        num_samples=997,
        num_shards=50,
    )
    order = Order([20] * 47 + [19] * 3, seed=3, shuffle_shards=2, num_streams=8)

    def read_by(ranks: range) -> int:
        positions = [p for p in range(len(order)) if p % world in ranks]
        return len({shard for p in positions for shard in order.windows_ahead(p)[0]})

    assert found.data is not None
    assert (found.data.num_samples, found.data.num_shards) == (997, 50)
    assert found.data.on_worker == read_by(range(1)) and found.data.on_node == read_by(range(workers_per_node))
    assert any("do not divide data.num_streams=8" in note for note in found.notes) == (world in (5, 6))
    assert found.trainings[0].passes == 8 / 997 and found.trainings[1].passes == 8 / (2 * 997)  # mirrored latents


def test_a_plan_of_data_at_hand_has_their_sizes_and_refuses_as_the_run_does(tmp_path):
    experiment = tiny_experiment(tmp_path)
    for number, part in enumerate(("train", "val")):
        write_pictures(tmp_path / part, 24, seed=number, shard_samples=5)
    found = plan(experiment, num_workers=2, device="cpu")
    assert found.data is not None and (found.data.num_samples, found.data.num_shards) == (24, 5)
    index = experiment.data.index(experiment.data.train)
    with torch.device("meta"):
        autoencoder = experiment.autoencoder.build(experiment.domain)
    assert found.latents_bytes == LatentShards.of(experiment, index, autoencoder).num_bytes
    assert found.trainings[0].disk_bytes == training_bytes(
        autoencoder, experiment.autoencoder_training, elsewhere=False
    )
    signal = collate([experiment.dataset(index)[0]])
    planned = make_signals(autoencoder, 1, for_prior=False)
    for name in ("inputs", "targets", "seed", "position", "number"):
        real, blank = getattr(signal, name), getattr(planned, name)
        assert (real.shape, real.dtype) == (blank.shape, blank.dtype), name
    with pytest.raises(ValueError, match="autoencoder_training.batch_size=32 must be a multiple of"):
        plan(experiment, num_workers=5, device="cpu")
    with pytest.raises(ValueError, match="domain.source_size=64; prepare the data at that size|source_size=64"):
        plan(override(experiment, {"domain.source_size": 64}), num_workers=2, device="cpu")


def test_without_data_a_plan_says_so_and_has_no_latents():
    found = plan(tiny("ddmi"), device="cpu")
    assert found.data is None and found.latents is None and found.trainings[0].passes is None
    assert any("nowhere/train" in note and "--samples" in note for note in found.notes)
    assert any("2 workers are assumed" in note for note in found.notes)
    assert plan(tiny("ddmi"), device="cpu", num_samples=1000).trainings[0].passes == 8 / 1000


def flags(text: str) -> dict[str, str]:
    words = text.split()
    return {w[2:].replace("-", "_"): v for w, v in zip(words, words[1:], strict=False) if w.startswith("--")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "gib", "changes", "start"),
    [
        ("ddmi/afhqv2-cat-256", 24.0, {"scale.zero_stage": 0}, "--autoencoder-training.micro-batch-size 5"),
        ("ddmi/celebahq-256", 14.0, {"autoencoder_training.micro_batch_size": 1}, "--scale.zero-stage 2 "),
        ("ddmi/celebahq-256", 8.5, {"autoencoder_training.micro_batch_size": 1, "scale.zero_stage": 2}, ""),
    ],
)
def test_what_does_not_fit_is_refused_with_a_change_that_does(path, gib, changes, start):
    experiment = override(presets()[path](), changes)
    with pytest.raises(ValueError) as refused:
        plan(experiment, num_workers=8, memory_gib=gib)
    remedy = str(refused.value).rpartition("; ")[2]
    assert remedy.startswith(start), remedy
    plan(override(experiment, flags(remedy)), num_workers=8, memory_gib=gib)


@pytest.mark.slow
def test_where_nothing_helps_the_least_is_said():
    with pytest.raises(
        ValueError, match=r"more than the 1 there are; the least is [\d.]+, with --.*: take more workers"
    ):
        plan(presets()["ddmi/celebahq-256"](), num_workers=8, memory_gib=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["furniture-image"], "preset 'furniture-image' is in both families; say ddmi/furniture-image or chinr/"),
        (["furniture-imag"], "unknown preset 'furniture-imag'; did you mean "),
        (
            ["ddmi/furniture-image", "--memory-gib", "0.08"],
            "ddmi/furniture-image: training the prior needs 0.09 GiB on ",
        ),
        (["ddmi/furniture-image", "--scale.num-workers", "3"], "autoencoder_training.batch_size=8 must be a multiple"),
        (["ddmi/furniture-image", "--memory-gib", "much"], "argument --memory-gib: invalid float value: 'much'"),
        (["ddmi/furniture-image", "--scale.zero", "3"], "unknown flag '--scale.zero'; did you mean "),
        (["chinr/celebahq-64", "--scale.zero-stage", "3"], "scale.zero_stage=3 does not work with"),
        (["ddmi/furniture-image", "--samples", "-1"], "num_samples=-1 must be above 0"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    assert run_here(monkeypatch, *arguments, job="jobs/plan.py") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_the_command_prints_the_plan_of_the_bundled_run(monkeypatch, capsys):
    assert run_here(monkeypatch, "furniture-all", "--scale.num-workers", "4", job="jobs/plan.py") == 0
    shown = capsys.readouterr().out
    assert shown == f"{plan(override(presets()['ddmi/furniture-all'](), {'scale.num_workers': 4}))}\n"
    for words in ("ddmi/furniture-all on 4 workers", "ZeRO 1 *", "activations", "data: 3,792 samples in ", "latents: "):
        assert words in shown
