"""The plan of a run against what engines really hold, send and compute with, on one, two and four ranks."""

import dataclasses
import gc
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from test_jobs import run_here
from tiny_chinr import chinr_experiment
from tiny_run import tiny_experiment, write_pictures
from torch import Tensor, nn

from distributed_inr.config import override
from distributed_inr.data.order import Order
from distributed_inr.domains.domain import Signal, collate
from distributed_inr.experiment import Experiment
from distributed_inr.latents import LatentShards
from distributed_inr.models.torchvision_cpu import import_torchvision
from distributed_inr.pipeline import training_bytes
from distributed_inr.plan import make_signals, plan, presets
from distributed_inr.presets import PRESETS
from distributed_inr.training.engine import Optim, Scale, build_engine, recompute_blocks
from distributed_inr.training.footprint import STAGES, Held, Tensors, activations
from distributed_inr.training.gradients import total

MICRO, NUM_MICRO = 2, 2

FEW_BYTES = 256


class Odd(nn.Module):
    """What the real models lack: frozen parameters, one too large to stay gathered, odd sizes, a float64 buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 33), nn.Linear(33, 7)
        self.large = nn.Linear(401, 307, bias=False)
        self.frozen = nn.Linear(11, 3).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("target", torch.zeros(3, dtype=torch.float64))

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        small = self.second(torch.tanh(self.first(batch.inputs[:, :5]))) * self.gain
        large, frozen = self.large(torch.ones(len(batch), 401)), self.frozen(torch.ones(len(batch), 11))
        return {"error": small.square().mean() + large.square().mean() + frozen.mean()}


class Few(nn.Module):
    """Fewer elements than ranks: some own nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        return {"error": self.weight.square().mean() + self.bias.square().mean() + 0 * batch.inputs.mean()}


@dataclasses.dataclass
class Case:
    """How to make a module and micro-batches of it, and the ZeRO stages that it can have."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Signal]
    stages: tuple[int, ...] = STAGES


def case_of(experiment: Experiment, name: str, size: int = MICRO) -> Case:
    with torch.device("meta"):
        model = experiment.autoencoder.build(experiment.domain)

    def build() -> nn.Module:
        if name == "autoencoder":
            return experiment.autoencoder.build(experiment.domain)
        return experiment.settle(1000).prior.build(model.latent_shape)

    stages = (0, 1, 2) if experiment.family == "chinr" and name == "autoencoder" else STAGES
    return Case(build, lambda: make_signals(model, size, for_prior=name == "prior"), stages)


def tiny(family: str) -> Experiment:
    experiment = {"ddmi": tiny_experiment, "chinr": chinr_experiment}[family](Path("nowhere"))
    sizes = {"micro_batch_size": MICRO, "ema_half_life_samples": 100}
    return override(experiment, {f"{n}_training.{k}": v for n in ("autoencoder", "prior") for k, v in sizes.items()})


def odd_batch() -> Signal:
    numbers = torch.arange(MICRO)
    return Signal(key=[""] * MICRO, seed=numbers, position=numbers, inputs=torch.rand(MICRO, 8))


def cases() -> dict[str, Case]:
    real = {f"{f} {n}": case_of(tiny(f), n) for f in ("ddmi", "chinr") for n in ("autoencoder", "prior")}
    return real | {"odd": Case(Odd, odd_batch), "few": Case(Few, odd_batch)}


# --- what engines hold and send


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of the distinct storages of some tensors, by address."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    found = (t.untyped_storage() for t in tensors if t is not None and not t.is_meta and not wrapped(t))
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def alive() -> dict[int, int]:
    gc.collect()
    return storages(each for each in gc.get_objects() if isinstance(each, Tensor))


def states(engine: Any, averages: list[Tensor], stage: int | None) -> dict[str, dict[int, int]]:
    """The engine's own tensors, by the plan's classes."""
    module, zero = engine.unwrap(), engine._engine.optimizer if stage is not None else None
    parameters: list[Any] = list(module.parameters())
    found: dict[str, dict[int, int]] = {field.name: {} for field in dataclasses.fields(Held)}
    found["weights"] = storages([*parameters, *module.buffers()])
    found["gradients"] = storages(p.grad for p in parameters)
    found["moments"] = storages(value for state in engine._adamw.state.values() for value in state.values())
    found["average"] = storages(averages)
    if stage in (1, 2):
        assert found["weights"].items() >= storages(zero.bit16_groups_flat).items()
        found["gradients"] |= storages(g for group in zero.averaged_gradients.values() for g in group)
        found["masters"] = storages(zero.single_partition_of_fp32_groups)
    if stage == 3:
        found["weights"] |= storages([zero.lp_param_buffer, *(p.ds_tensor for p in parameters)])
        found["gradients"] |= storages([zero.grad_partitions_flat_buffer])
        found["masters"] = storages(zero.fp32_partitioned_groups_flat)
        found["buffers"] = storages(bucket.buffer for bucket in zero.ipg_buckets.values())
    return found


@dataclasses.dataclass
class Measured:
    """One rank's, of one engine, between backward pass and update."""

    held: Held
    others: int
    """Bytes of all other tensors that were not there before; those of the micro-batch not counted."""
    sent: int


def measure(case: Case, stage: int | None) -> Measured:
    gc.collect()
    gc.freeze()  # what was there before is not looked at
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    scale = Scale(engine="accelerate") if stage is None else Scale(zero_stage=stage)
    engine = build_engine(case.build(), scale=scale, optim=Optim(), micro_batch_size=MICRO, num_micro_batches=NUM_MICRO)
    averages = [fragment.weight.clone() for fragment in engine.state()]

    batch = case.batch()

    def look() -> None:
        parts = states(engine, averages, stage)
        known = storages(value for value in vars(batch).values() if isinstance(value, Tensor)).keys()
        known |= {address for part in parts.values() for address in part}
        found["held"] = Held(**{name: sum(part.values()) for name, part in parts.items()})
        for _ in range(50):  # gloo's thread lets go of what it has reduced a moment later
            found["others"] = sum(size for address, size in alive().items() if address not in known)
            if found["others"] < FEW_BYTES:
                break
            time.sleep(0.1)

    def step(before_update: Callable[[], None] = lambda: None) -> None:
        for _ in range(NUM_MICRO):
            engine.step(engine.forward(batch), keys=batch.key, lr=1e-3, before_update=before_update)

    step()  # stage 3 learns the order of the layers in the first two
    step()
    step(look)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    return Measured(found["held"], found["others"], sent(profile.profiler.kineto_results.events()))  # type: ignore


def sent(events: Any) -> int:
    """Bytes that collectives of float32 send by ring algorithms; a step's few metrics are float64."""
    sizes = {"gloo:all_reduce": 0, "c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 0}
    for event in events:
        if event.name() in sizes and "double" not in event.dtypes():
            sizes[event.name()] += max((shape[0] for shape in event.shapes() if shape), default=0)
    world, reduced = torch.distributed.get_world_size(), sizes["c10d::_reduce_scatter_base_"]
    both = 2 * (sizes["gloo:all_reduce"] - reduced)  # gloo reduces for all in order to reduce and scatter
    return round(4 * (world - 1) / world * (sizes["c10d::_allgather_base_"] + reduced + both))


def measure_all() -> dict[tuple[str, int | None], Measured]:
    return {(name, stage): measure(case, stage) for name, case in cases().items() for stage in (*case.stages, None)}


@pytest.fixture(scope="module", params=[pytest.param(world, marks=pytest.mark.slow) for world in (1, 2, 4)])
def measured(request: pytest.FixtureRequest) -> list[dict[tuple[str, int | None], Measured]]:
    """By rank, of each module at each ZeRO stage and, as stage None, under Accelerate."""
    return run_processes(measure_all, request.param)


def test_states_are_exact_to_the_byte_on_every_rank(measured):
    for rank, found in enumerate(measured):
        for (name, stage), one in found.items():
            tensors = Tensors.of(cases()[name].build())
            assert one.held == tensors.held(stage or 0, world=len(measured), rank=rank, with_average=True), (
                name,
                stage,
            )


def test_nothing_else_is_held_but_a_few_numbers(measured):
    """Found by looking at all tensors there are, not at the engine's."""
    for found in measured:
        assert max(one.others for one in found.values()) < FEW_BYTES


def test_what_is_sent_is_exact_to_the_byte(measured):
    world = len(measured)
    for found in measured:
        for (name, stage), one in found.items():
            expected = Tensors.of(cases()[name].build()).sent(stage or 0, world=world, num_micro_batches=NUM_MICRO)
            assert one.sent == expected, (name, stage)


@pytest.mark.parametrize("family", ["ddmi", "chinr"])
def test_the_plan_has_the_states_of_one_of_the_ranks(family):
    for training in plan(tiny(family), num_workers=4, device="cpu").trainings:
        tensors = Tensors.of(case_of(tiny(family), training.name).build())
        for stage, memory in enumerate(training.memory):
            if memory is None:
                assert (family, stage) == ("chinr", 3)
                continue
            held = [tensors.held(stage, world=4, rank=rank, with_average=True) for rank in range(4)]
            assert memory.held in held


# --- activations


def peak(case: Case, scale: Scale) -> int:
    """The most bytes that torch really allocates in a micro-batch's passes, when there are gradients already."""
    torch.manual_seed(0)
    module = case.build()
    if scale.activation_checkpointing:
        recompute_blocks(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def passes() -> None:
        batch = case.batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=scale.precision == "bfloat16"):
            losses = module(batch)
        total(losses).backward()

    passes()  # what the first pass leaves is not counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        passes()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


BANK = {"autoencoder.fitting.kind": "auto-decoding", "autoencoder.fitting.penalty": 0.1}


@pytest.mark.parametrize(
    ("path", "name", "size", "changes"),
    [
        ("ddmi/furniture-image", "autoencoder", 4, {}),
        ("ddmi/furniture-image", "autoencoder", 4, {"scale.precision": "bfloat16"}),
        ("ddmi/furniture-image", "autoencoder", 4, {"scale.activation_checkpointing": True}),
        ("ddmi/furniture-image", "prior", 64, {}),
        ("ddmi/furniture-image", "prior", 64, {"scale.precision": "bfloat16"}),
        ("ddmi/furniture-all", "prior", 16, {}),  # fewer, and a convolution's workspace shows
        ("chinr/furniture-image", "autoencoder", 4, {}),
        ("chinr/furniture-image", "autoencoder", 4, {"autoencoder.fitting.chunk": 2}),
        ("chinr/furniture-image", "autoencoder", 4, {"autoencoder.fitting.order": "first"}),
        ("chinr/furniture-image", "autoencoder", 4, BANK),
        ("chinr/furniture-image", "prior", 32, {}),
        ("chinr/furniture-image", "prior", 32, {"prior.networks": "per-layer"}),
        ("chinr/furniture-image-functa", "autoencoder", 4, {}),
    ],
)
def test_activations_are_those_of_a_real_pass(path, name, size, changes):
    experiment = override(presets()[path](), changes)
    case = case_of(experiment, name, size)
    planned = activations(case.build, case.batch, scale=experiment.scale, is_cuda=False)
    assert planned == pytest.approx(peak(case, experiment.scale), rel=0.02)


def test_activations_count_the_network_of_a_perceptual_loss(tmp_path):
    import_torchvision()
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    network = _NoTrainLpips(net="squeeze", pnet_rand=True)
    parts = [(index, layer) for part in network.net.slices for index, layer in part.named_children()]
    features = {f"features.{i}.{n}": tensor for i, layer in parts for n, tensor in layer.state_dict().items()}
    torch.save(features, tmp_path / "squeezenet.pth")
    options = {"network": "squeeze", "checkpoint": str(tmp_path / "squeezenet.pth"), "weight": 1.0}
    changes = {f"autoencoder.perceptual_{key}": value for key, value in options.items()}
    sizes = {"domain.size": 32, "autoencoder.num_points": 32 * 32}  # smaller ones have nothing left at its last layers
    experiment = override(tiny("ddmi"), changes | sizes)
    (planned, _) = plan(experiment, device="cpu").trainings
    memory = planned.memory[1]
    assert memory is not None
    case = case_of(experiment, "autoencoder")
    weights = sum(4 * parameter.numel() for parameter in network.parameters())
    # Convolutions of a few pixels have workspaces that are not seen.
    assert memory.activations == pytest.approx(weights + peak(case, Scale()), rel=0.1)


def test_a_gpu_computes_norms_in_float32_and_reads_planes_in_half_precision():
    """As torch's lists for its autocast say; the CPU's are others."""

    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)
            self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1)])

        def forward(self, batch: Signal) -> dict[str, Tensor]:
            hidden = self.conv(batch.inputs)
            types.append(hidden.dtype)
            types.append(self.norm(hidden).dtype)
            types.append(F.interpolate(hidden, scale_factor=2.0).dtype)
            grid = torch.zeros(len(batch), 4, 4, 2, dtype=hidden.dtype)
            types.append(F.grid_sample(hidden, grid, align_corners=False).dtype)
            return {"error": self.blocks[0](self.norm(hidden)).square().mean()}

    def make_batch() -> Signal:
        numbers = torch.arange(2)
        return Signal(key=[""] * 2, seed=numbers, position=numbers, inputs=torch.zeros(2, 3, 8, 8))

    types: list[torch.dtype] = []
    on_gpu = activations(Pieces, make_batch, scale=Scale(), is_cuda=True)
    half, single = torch.bfloat16, torch.float32
    assert types == [half, single, single, half]
    types.clear()
    on_cpu = activations(Pieces, make_batch, scale=Scale(precision="bfloat16"), is_cuda=False)
    assert types[:2] == [half, half] and on_gpu > on_cpu
    types.clear()
    activations(Pieces, make_batch, scale=Scale(), is_cuda=False)
    assert set(types) == {single}


# --- what a person is told


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
