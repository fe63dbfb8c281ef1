"""The plan of a run against what engines really hold, send and compute with, on one, two and four ranks."""

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_processes
from tiny_chinr import chinr_experiment
from tiny_run import tiny_experiment
from torch import Tensor, nn

from distributed_inr.config import override
from distributed_inr.domains.domain import Signal
from distributed_inr.experiment import Experiment
from distributed_inr.models.torchvision_cpu import import_torchvision
from distributed_inr.plan import make_signals, plan, presets
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
    return Case(build, lambda: make_signals(model, size, for_prior=name == "prior", text=experiment.text), stages)


def tiny(family: str) -> Experiment:
    experiment = {"ddmi": tiny_experiment, "chinr": chinr_experiment}[family](Path("nowhere"))
    sizes = {"micro_batch_size": MICRO, "ema_half_life_samples": 100}
    return override(experiment, {f"{n}_training.{k}": v for n in ("autoencoder", "prior") for k, v in sizes.items()})


def odd_batch() -> Signal:
    numbers = torch.arange(MICRO)
    return Signal(key=[""] * MICRO, seed=numbers, position=numbers, inputs=torch.rand(MICRO, 8))


def cases() -> dict[str, Case]:
    real = {f"{f} {n}": case_of(tiny(f), n) for f in ("ddmi", "chinr") for n in ("autoencoder", "prior")}
    real["ddmi prior with text"] = case_of(override(tiny("ddmi"), {"text.kind": "minilm"}), "prior")
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


SOME = [pytest.param(world, marks=pytest.mark.slow) for world in (1, 2)]
MOST = pytest.param(4, marks=[pytest.mark.slow, pytest.mark.faults])


@pytest.fixture(scope="module", params=[*SOME, MOST])
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
    """The most bytes that torch really allocates in a micro-batch's passes, when there are gradients already.

    With one thread: a convolution takes a workspace of its weights' size for each.
    """
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

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    passes()  # what the first pass leaves is not counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        passes()
    torch.set_num_threads(threads)
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
