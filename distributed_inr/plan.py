"""The plan of a run: what it will need of memory, disk and network on any number of workers, before it is launched.

Nothing is allocated: models are built without contents. States are exact; `training.footprint` says what is not.
"""

import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from distributed_inr.config import override
from distributed_inr.data.order import Order
from distributed_inr.data.reader import check_cache
from distributed_inr.data.shards import ShardIndex
from distributed_inr.domains import AnyDomain
from distributed_inr.domains.domain import Signal
from distributed_inr.experiment import Experiment
from distributed_inr.latents import LatentShards
from distributed_inr.models import D2CVAE, AnyAutoencoder, AnyPrior, FieldAutoencoder, LayersOfExperts
from distributed_inr.models.latent_fitting import AutoDecoding
from distributed_inr.models.perceptual import load_network
from distributed_inr.models.text import AnyTextEncoder
from distributed_inr.needs import GIB, Device, Memory, Plan, Reading, TrainingPlan
from distributed_inr.pipeline import bank_bytes, checkpoint_bytes, indexes, training_bytes
from distributed_inr.presets import PRESETS
from distributed_inr.training.bank import num_bytes
from distributed_inr.training.engine import Scale
from distributed_inr.training.footprint import STAGES, Tensors, activations

_MANY = 1 << 20
"""Training signals that are assumed where their number is not known and a model depends on it."""


def plan(
    experiment: Experiment,
    *,
    num_workers: int | None = None,
    workers_per_node: int = 8,
    device: Device = "cuda",
    num_samples: int | None = None,
    num_shards: int | None = None,
    memory_gib: float | None = None,
) -> Plan:
    """What a run of `experiment` needs.

    Raises ValueError where the run itself would refuse, and where a worker needs more than `memory_gib`: naming the
    cheapest option that would do.

    Args:
        num_workers: in place of `scale.num_workers`; two are assumed where neither is given.
        workers_per_node: that share a cache of shards.
        device: what trains; decides the precision that `scale.precision=auto` stands for.
        num_samples: of the training set, where it is not at hand.
        num_shards: of that set, of equal size.
        memory_gib: of a GPU, or of what a worker has on a CPU.
    """
    for name, value in (("num_samples", num_samples), ("num_shards", num_shards), ("memory_gib", memory_gib)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value} must be above 0, or left out")
    if num_workers is not None:
        experiment = override(experiment, {"scale.num_workers": num_workers})
    sizes = (workers_per_node, device, num_samples, num_shards)
    found = _plan(experiment, *sizes)
    limit = math.inf if memory_gib is None else memory_gib * GIB
    if any(training.needed > limit for training in found.trainings):
        remedy = _remedy(experiment, limit, lambda changed: _plan(changed, *sizes))
        worst = max(found.trainings, key=lambda training: training.needed)
        memory = worst.memory[worst.zero_stage]
        assert memory is not None
        raise ValueError(
            f"{found.name}: training the {worst.name} needs {worst.needed / GIB:.2f} GiB on a worker "
            f"({memory.activations / GIB:.2f} of activations), more than the {memory_gib:g} there are; {remedy}"
        )
    return found


def presets() -> Mapping[str, Callable[[], Experiment]]:
    """Those of both families by <family>/<name>, and by the name alone where only one has it."""
    found = {f"{family}/{name}": preset for family, table in PRESETS.items() for name, preset in table.items()}
    names = [name for table in PRESETS.values() for name in table]
    return found | {path.split("/")[1]: found[path] for path in found if names.count(path.split("/")[1]) == 1}


def refuse_ambiguous(name: str) -> None:
    """Raise ValueError for a preset's name that several families have."""
    paths = [f"{family}/{name}" for family, table in PRESETS.items() if name in table]
    if len(paths) > 1:
        raise ValueError(f"preset {name!r} is in both families; say {' or '.join(paths)}")


def _plan(
    experiment: Experiment, workers_per_node: int, device: Device, num_samples: int | None, num_shards: int | None
) -> Plan:
    if isinstance(experiment.autoencoder, LayersOfExperts) and experiment.autoencoder.folded:
        raise ValueError("autoencoder.folded=True cannot be trained; leave it out")
    if getattr(getattr(experiment.autoencoder, "encoder", None), "pretrained", False):  # nothing is to be downloaded
        experiment = override(experiment, {"autoencoder.encoder.pretrained": False})
    scale, notes = experiment.scale, list[str]()
    num_workers = scale.num_workers or (1 if scale.launcher == "none" else 2)
    if scale.num_workers is None and scale.launcher != "none":
        notes.append("2 workers are assumed; a run takes one for each GPU of its cluster: --scale.num-workers")

    index, problem = _training_set(experiment)
    samples = None if num_samples is None else [num_samples]
    if index is not None:
        samples = [shard.samples for shard in index.shards]
        check_cache(experiment.dataset(index), num_workers)
    elif num_samples is None:
        notes.append(f"{problem}. Give the size of the set, --samples and --shards, for what depends on it")
    elif num_shards is not None:
        samples = [num_samples // num_shards + (i < num_samples % num_shards) for i in range(num_shards)]
    total = sum(samples) if samples else None

    settled = experiment.settle(total or _MANY, {} if index is None else index.protocol)
    if total is None and settled != experiment:
        notes.append(f"{_MANY:,} signals are assumed where the prior's size depends on their number")
    experiment = settled
    with torch.device("meta"):
        autoencoder = experiment.autoencoder.build(experiment.domain)
        prior = experiment.prior.build(autoencoder.latent_shape)
    latents = None
    if index is not None:
        latents = LatentShards.of(experiment, index, autoencoder)
    elif total is not None:
        latents = LatentShards.sized(experiment, total, autoencoder, has_text=False)
    bank = 0 if experiment.bank is None or latents is None else bank_bytes(experiment, latents, num_workers)

    trainings = []
    if experiment.autoencoder_from is None:
        trainings.append(_training(experiment, "autoencoder", autoencoder, num_workers, device, total, bank))
    copied = None if total is None else total * experiment.domain.num_copies
    trainings.append(_training(experiment, "prior", prior, num_workers, device, copied))

    def reading(samples: Sequence[int]) -> Reading:
        counts = (1, min(workers_per_node, num_workers))
        on_worker, on_node = (_num_read(samples, experiment, range(count), num_workers) for count in counts)
        return Reading(sum(samples), len(samples), on_worker, on_node)

    if experiment.data.num_streams % num_workers:
        notes.append(
            f"{num_workers} workers do not divide data.num_streams={experiment.data.num_streams}, so that several read "
            f"the same shards; {-(-experiment.data.num_streams // num_workers) * num_workers} would do"
        )
    if scale.compile:
        notes.append("scale.compile=True saves some of the activations; their figure is an upper bound")
    if scale.activation_checkpointing:
        notes.append("scale.activation_checkpointing=True: what is recomputed counts as activations while it is held")
    half = scale.precision == "bfloat16" or (scale.precision == "auto" and device == "cuda")
    return Plan(
        name=f"{experiment.family}/{experiment.name}",
        num_workers=num_workers,
        workers_per_node=min(workers_per_node, num_workers),
        device=device,
        precision="bfloat16 over float32 weights" if half else "float32",
        trainings=tuple(trainings),
        data=None if samples is None or (index is None and num_shards is None) else reading(samples),
        latents=None if latents is None else reading(_blocks(latents)),
        latents_bytes=None if latents is None else latents.num_bytes,
        bank_bytes=0 if experiment.bank is None or latents is None else num_bytes(latents.num_samples, latents.shape),
        notes=tuple(notes),
    )


def _training(
    experiment: Experiment,
    name: Literal["autoencoder", "prior"],
    module: nn.Module,
    num_workers: int,
    device: Device,
    num_signals: int | None,
    other_bytes: int = 0,
) -> TrainingPlan:
    training, scale = getattr(experiment, f"{name}_training"), experiment.scale
    num_micro_batches = training.num_micro_batches(num_workers, path=f"{name}_training")
    micro_batch_size = training.batch_size // num_workers // num_micro_batches
    fullest = _fullest(
        experiment.autoencoder,
        experiment.prior if name == "prior" else None,
        experiment.text,
        experiment.domain,
        micro_batch_size,
        Scale(precision=scale.precision, activation_checkpointing=scale.activation_checkpointing),
        device,
    )
    tensors = Tensors.of(module)

    def memory(stage: int) -> Memory | None:
        if _changed(experiment, {"scale.engine": "deepspeed", "scale.zero_stage": stage}) is None:
            return None
        found = []
        for rank in range(num_workers):
            held = tensors.held(stage, world=num_workers, rank=rank, with_average=training.ema_half_life_samples > 0)
            during, after = tensors.passing(stage, world=num_workers, rank=rank, is_cuda=device == "cuda")
            found.append(Memory(held, fullest, max(during, after - fullest)))
        return max(found, key=lambda memory: memory.total)

    return TrainingPlan(
        name=name,
        model=type(module).__name__,
        num_parameters=tensors.num_parameters,
        num_trainable=tensors.num_trainable,
        num_workers=num_workers,
        num_micro_batches=num_micro_batches,
        micro_batch_size=micro_batch_size,
        num_steps=-(-training.num_samples // training.batch_size),
        passes=None if num_signals is None else training.num_samples / num_signals,
        zero_stage=scale.zero_stage if scale.engine == "deepspeed" else 0,
        memory=tuple(memory(stage) for stage in STAGES),
        sent=tuple(tensors.sent(stage, world=num_workers, num_micro_batches=num_micro_batches) for stage in STAGES),
        checkpoint_bytes=checkpoint_bytes(module, training),
        num_checkpoints=training.keep_checkpoints + 2,
        disk_bytes=training_bytes(module, training, elsewhere=experiment.checkpoints is not None) + other_bytes,
    )


@functools.lru_cache(maxsize=64)
def _fullest(
    autoencoder: AnyAutoencoder,
    prior: AnyPrior | None,
    text: AnyTextEncoder | None,
    domain: AnyDomain,
    size: int,
    scale: Scale,
    device: Device,
) -> int:
    """Bytes of activations of a micro-batch of `size`; of the autoencoder's training, where there is no prior."""
    with torch.device("meta"):
        model = autoencoder.build(domain)
    network = None
    if prior is None and isinstance(autoencoder, D2CVAE) and autoencoder.perceptual_weight:
        assert autoencoder.perceptual_checkpoint is not None
        # Before the passes, in which nothing can be loaded: the only thing that is allocated.
        network = load_network(autoencoder.perceptual_network, autoencoder.perceptual_checkpoint, torch.device("cpu"))

    def build() -> nn.Module:
        return autoencoder.build(domain) if prior is None else prior.build(model.latent_shape)

    def signals() -> Signal:
        return make_signals(model, size, for_prior=prior is not None, text=text)

    found = activations(build, signals, scale=scale, is_cuda=device == "cuda")
    return found + (0 if network is None else sum(4 * p.numel() for p in network.parameters()))


def make_signals(
    autoencoder: FieldAutoencoder, size: int, *, for_prior: bool, text: AnyTextEncoder | None = None
) -> Signal:
    """A blank micro-batch of the shapes and types that the training of an autoencoder, or of its prior, reads; with the
    longest captions that the text encoder embeds.
    """
    fitting = getattr(autoencoder.cfg, "fitting", None)
    numbers, names = torch.arange(size), [""] * size
    common: dict[str, Any] = dict(key=names, text=names, seed=numbers, position=numbers, number=numbers)
    if for_prior and text is not None:
        common |= dict(
            text_tokens=torch.zeros(size, text.context_length, text.width),
            text_mask=torch.ones(size, text.context_length, dtype=torch.bool),
        )
    if for_prior:
        return Signal(inputs=torch.zeros(size, 1 + autoencoder.is_variational, *autoencoder.latent_shape), **common)
    latent = None
    if isinstance(fitting, AutoDecoding):
        latent = torch.zeros(size, *autoencoder.latent_shape).requires_grad_()
    inputs, targets = autoencoder.domain.blank(size)
    return Signal(inputs=inputs, targets=targets, latent=latent, **common)


def _training_set(experiment: Experiment) -> tuple[ShardIndex | None, str]:
    """The training shards, or why they are not here. Raises ValueError where the run would refuse them."""
    try:
        experiment.data.index(experiment.data.train)
    except (ValueError, OSError) as error:
        return None, str(error)
    return indexes(experiment)[0], ""


def _num_read(samples: Sequence[int], experiment: Experiment, ranks: range, world: int) -> int:
    """Of shards of these sizes, how many some ranks read from in the first epoch: `data.order` says which."""
    data = experiment.data
    order = Order(samples, seed=experiment.seed, shuffle_shards=data.shuffle_shards, num_streams=data.num_streams)
    windows: set[int] = set()
    every = math.gcd(data.num_streams, world)  # a rank's positions lie in every so many spans
    for span in range(min(data.num_streams, len(order))):
        if span % every in {rank % every for rank in ranks}:
            last = range(span, len(order), data.num_streams)[-1]
            windows.update(range(order.window_number(span)[1], order.window_number(last)[1] + 1))
    return sum(min(data.shuffle_shards, len(samples) - window * data.shuffle_shards) for window in windows)


def _blocks(latents: LatentShards) -> list[int]:
    """Samples of each shard of latents."""
    starts = range(0, latents.num_samples, latents.block)
    return [latents.copies * min(latents.block, latents.num_samples - start) for start in starts]


def _changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment | None:
    """The experiment with some options changed, if it can have them."""
    try:
        return override(experiment, changes)
    except ValueError:
        return None


def _remedy(experiment: Experiment, limit: float, plan_of: Callable[[Experiment], Plan]) -> str:
    """The cheapest change that fits: the next ZeRO stage, smaller micro-batches, recomputing, or these together."""
    engine = {} if experiment.scale.engine == "deepspeed" else {"scale.engine": "deepspeed"}
    stages = [s for s in STAGES if s > (0 if engine else experiment.scale.zero_stage)]
    zeros = [z for z in (engine | {"scale.zero_stage": s} for s in stages) if _changed(experiment, z) is not None]
    most, again = zeros[-1] if zeros else {}, {"scale.activation_checkpointing": True}
    tries = [(zero, False) for zero in zeros] + [({}, True), (again, False)]
    tries += [(most, True), (again, True), (most | again, True)]
    least, how = math.inf, ""
    for changes, smaller in tries:
        if (changed := _changed(experiment, changes)) is None:
            continue
        changes = changes | (_smaller(changed, limit, plan_of) if smaller else {})
        needed = max(training.needed for training in plan_of(override(experiment, changes)).trainings)
        flags = " ".join(f"--{path.replace('_', '-')} {str(value).lower()}" for path, value in changes.items())
        if needed <= limit:
            return f"{flags} needs {needed / GIB:.2f}"
        if needed < least:
            least, how = needed, flags
    return f"the least is {least / GIB:.2f}, with {how}: take more workers, more memory, or a smaller model"


def _smaller(experiment: Experiment, limit: float, plan_of: Callable[[Experiment], Plan]) -> dict[str, Any]:
    """The largest micro-batches that fit, or the smallest that there are, of the trainings that need too much."""
    changes = {}
    for index, training in enumerate(plan_of(experiment).trainings):
        path = f"{training.name}_training.micro_batch_size"
        share = training.num_micro_batches * training.micro_batch_size
        sizes = [size for size in range(1, training.micro_batch_size + 1) if share % size == 0]

        def needed(size: int, path: str = path, index: int = index) -> int:
            return plan_of(override(experiment, {path: size})).trainings[index].needed

        if training.needed > limit:
            changes[path] = sizes[max(0, bisect.bisect_right(sizes, limit, key=needed) - 1)]
    return changes
