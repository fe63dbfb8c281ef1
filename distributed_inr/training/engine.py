"""Engines: DeepSpeed (ZeRO 0-3) or Accelerate (one process or DDP) around one module, equal to a plain PyTorch loop.

Everything that training does with the module goes through `Engine.forward`, because calling a sub-method of a wrapped
module skips gradient synchronisation. Weights are float32 always; bfloat16 is `torch.autocast`.
"""

import contextlib
import functools
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from distributed_inr.config import config
from distributed_inr.domains.domain import Signal
from distributed_inr.training.fragments import Fragment, Read, is_first, load_state, view
from distributed_inr.training.gradients import Metrics, agree, clip, squared_norm, total

logger = logging.getLogger(__name__)

BUCKET = 50_000_000
"""Elements in one collective of gradients or weights."""


@config
class Scale:
    """Where and how the training runs: none of it changes the result beyond rounding."""

    num_workers: PositiveInt | None = None
    """Training processes. none: one for each GPU, or two on a CPU."""
    engine: Literal["deepspeed", "accelerate"] = "deepspeed"
    """deepspeed: ZeRO. accelerate: one process or plain data parallelism, for machines without DeepSpeed."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What DeepSpeed divides among the workers: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; weights are float32 always. auto: bfloat16 on a GPU, float32 on a CPU."""
    activation_checkpointing: bool = False
    """Recompute the model's blocks (members of its outermost module lists) in the backward pass: saves memory."""
    compile: bool = False
    """Compile the model with torch.compile. Where no C++ compiler is found, a warning and no compilation."""
    launcher: Literal["ray", "none"] = "ray"
    """ray: Ray Train starts the workers. none: one worker in the calling process (debugging, notebooks)."""
    max_failures: NonNegativeInt = 3
    """Times that Ray restarts a stage's workers from the newest checkpoint before it gives up."""
    num_threads: PositiveInt | None = None
    """Threads of each worker on a CPU. none: the machine's cores divided by the workers."""
    timeout_seconds: PositiveInt = 600
    """Time after which a worker that waits for the others, or for data, gives up, and a silent one is killed."""

    def __post_init__(self) -> None:
        if self.compile and self.engine == "deepspeed" and self.zero_stage == 3:
            raise ValueError(
                "scale.compile=True does not work with scale.zero_stage=3, whose weights come and go between layers; "
                "use scale.zero_stage=2 or scale.compile=False"
            )
        if self.launcher == "none" and self.num_workers not in (None, 1):
            raise ValueError(f"scale.num_workers={self.num_workers} needs scale.launcher='ray'; 'none' runs one worker")


@config
class Optim:
    """AdamW and its schedule. Lengths are in samples seen, so they do not move with batch size or workers."""

    lr: PositiveFloat = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square, a step."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay, on every parameter."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """cosine: falls to zero at the end of the run."""
    warmup_samples: NonNegativeInt = 0
    """Samples over which the learning rate rises linearly from zero."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients with a larger global norm are scaled down to it. none: never."""

    def learning_rate(self, samples: int, *, batch_size: int, num_samples: int) -> float:
        """The rate of the step that takes the run from `samples` to `samples + batch_size` seen, of `num_samples`."""
        warmup = min(1.0, (samples + batch_size) / self.warmup_samples) if self.warmup_samples else 1.0
        if self.schedule == "constant":
            return self.lr * warmup
        progress = max(0, samples - self.warmup_samples) / max(1, num_samples - self.warmup_samples)
        return self.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _nothing() -> None:
    pass


@runtime_checkable
class Engine(Protocol):
    """What the loop needs of a training engine. Every rank calls every method, in the same order."""

    steps: int
    """Optimizer steps made, in this process and before the checkpoint it came from."""

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""
        ...

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        """The wrapped module's weighted losses on a micro-batch. In evaluation, call it under `torch.no_grad`."""
        ...

    def step(
        self, losses: dict[str, Tensor], *, keys: Sequence[str], lr: float, before_update: Callable[[], None] = _nothing
    ) -> Metrics | None:
        """Add the gradient of a micro-batch's losses; after the last micro-batch of the step, update the weights.

        Returns None; or after an update the means over all ranks' samples, "train/<loss>" and "train/total", and
        "grad_norm". Raises FloatingPointError, on every rank and instead of the update, if any of them is not finite;
        the gradients are dropped, and training may go on with the next step.

        Args:
            before_update: called just before the weights change; it may raise FloatingPointError too, on every rank.
        """
        ...

    def state(self) -> list[Fragment]:
        """What this rank owns: one fragment (perhaps empty) for each parameter, in the module's order."""
        ...

    def load(self, read: Read, *, steps: int) -> None:
        """Set the weights and the optimizer's state, however many ranks wrote them."""
        ...

    def unwrap(self) -> nn.Module:
        """The module itself, for its configuration and buffers. Never call it in training."""
        ...


def build_engine(
    module: nn.Module, *, scale: Scale, optim: Optim, micro_batch_size: int, num_micro_batches: int
) -> Engine:
    """Wrap `module` for training with `num_micro_batches` micro-batches a step on each rank."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        module.cuda()
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(f"parameter {name} has no dimension, which DeepSpeed cannot send; give it the shape [1]")
        parameter.data = parameter.data.contiguous()  # fragments are views of flattened parameters
    if scale.activation_checkpointing:
        recompute_blocks(module)
    if scale.compile and _has_compiler():
        module.compile()
    kind = DeepSpeedEngine if scale.engine == "deepspeed" else AccelerateEngine
    return kind(
        module, scale=scale, optim=optim, micro_batch_size=micro_batch_size, num_micro_batches=num_micro_batches
    )


class DeepSpeedEngine:
    """ZeRO: optimizer state (1), gradients (2) and weights (3) divided among the ranks."""

    def __init__(self, module: nn.Module, *, scale: Scale, optim: Optim, micro_batch_size: int, num_micro_batches: int):
        import deepspeed
        from deepspeed.utils.logging import set_log_level_from_string

        set_log_level_from_string("error")
        # DeepSpeed calls collectives by names that torch 2.13 has renamed, and warns at each of them.
        warnings.filterwarnings("ignore", message=".torch.distributed.* is deprecated", category=FutureWarning)
        if not torch.cuda.is_available():
            # Its shared-memory collectives would be compiled at first use: 40 s, and only with a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():  # one process, launched by nothing: DeepSpeed wants a group all the same
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)

        self._module, self._stage, self._num_micro_batches = module, scale.zero_stage, num_micro_batches
        self._pending: list[tuple[dict[str, Tensor], Sequence[str]]] = []
        self.steps, self._max_grad_norm = 0, optim.max_grad_norm
        bucket = min(BUCKET, 2 * sum(p.numel() for p in module.parameters()))  # even, as it demands
        zero: dict[str, Any] = {"stage": self._stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self._stage in (1, 2):
            zero["compute_grad_norm"] = False  # ours, for the check, is enough; its own in float64 takes 10 % of a step
            if not torch.cuda.is_available():  # on a CPU, its copies to overlap with communication take 20 %
                zero |= {"contiguous_gradients": False, "reduce_scatter": False}
        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": num_micro_batches,
            "gradient_clipping": (optim.max_grad_norm or 0.0) if self._stage == 3 else 0.0,  # its own default is 1
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }
        self._adamw: Any = _adamw(module, optim)
        self._engine: Any = deepspeed.initialize(
            model=_Autocast(module, scale), optimizer=self._adamw, config=settings, dist_init_required=False
        )[0]
        self.device = torch.device(self._engine.device)
        self._fragments = self._hold()

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        return self._engine(batch)

    def step(
        self, losses: dict[str, Tensor], *, keys: Sequence[str], lr: float, before_update: Callable[[], None] = _nothing
    ) -> Metrics | None:
        self._pending.append(({name: loss.detach() for name, loss in losses.items()}, keys))
        self._engine.backward(total(losses))
        metrics = None
        if len(self._pending) == self._num_micro_batches:
            pending, self._pending = self._pending, []
            gradients = self._gradients()
            try:
                metrics = agree(pending, squared_norm(gradients, shared=self._stage == 0), self.steps)
                before_update()
            except FloatingPointError:
                self._adamw.found_inf = torch.ones((), device=self.device)  # makes AdamW pass its step over
                self._engine.step()
                del self._adamw.found_inf
                raise
            if self._stage != 3:
                clip(gradients, metrics["grad_norm"], self._max_grad_norm)
            self.steps += 1
            for group in self._adamw.param_groups:
                group["lr"] = lr
        self._engine.step()
        assert metrics is None or self._engine.was_step_applied()
        return metrics

    def state(self) -> list[Fragment]:
        if self._stage == 0:
            return [f.share(dist.get_rank(), dist.get_world_size()) for f in self._fragments]
        return self._fragments

    def load(self, read: Read, *, steps: int) -> None:
        from deepspeed import zero

        parameters = dict(self._module.named_parameters())
        load_state(self._fragments, self._adamw, self._module, read, steps)
        for f in self._fragments:
            parameter, size = parameters[f.name], math.prod(f.shape)
            with zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
                if self._stage != 3 or dist.get_rank() == 0:
                    parameter.data.copy_(read("weight", f.name, 0, size).view(f.shape))
            f.weight.copy_(read("weight", f.name, f.offset, f.offset + f.weight.numel()))  # DeepSpeed's own copy
        self.steps = steps

    def unwrap(self) -> nn.Module:
        return self._module

    def _gradients(self) -> list[Tensor]:
        """Of this rank's part of the parameters, averaged over the ranks (stage 0: of all of them)."""
        if self._stage == 0:
            return [p.grad for p in self._module.parameters() if p.grad is not None]
        if self._stage == 3:
            return [self._engine.optimizer.grad_partitions_flat_buffer]
        return [gradient for group in self._engine.optimizer.averaged_gradients.values() for gradient in group]

    def _hold(self) -> list[Fragment]:
        """The part of each parameter whose optimizer state is on this rank (stage 0: all of it)."""
        rank, world, zero = dist.get_rank(), dist.get_world_size(), self._engine.optimizer
        fragments = []
        parameters: list[tuple[str, Any]] = list(self._module.named_parameters())
        for name, p in parameters:
            shape, address = p.shape, 0
            if self._stage == 0:
                start, stop, held = 0, p.numel(), p
            elif self._stage == 3:  # equal parts of each parameter, the last ones padded
                shape, size = p.ds_shape, p.ds_tensor.numel()
                start, stop = min(rank * size, p.ds_numel), min((rank + 1) * size, p.ds_numel)
                held = p.ds_tensor
                if p.requires_grad:
                    group, address, _ = zero.grad_position[zero.get_param_id(p)]
                    held = zero.fp32_partitioned_groups_flat[group]
            elif not p.requires_grad:
                start, stop, held = rank * p.numel() // world, (rank + 1) * p.numel() // world, p
                address = start
            elif p._hp_mapping is None:  # nothing of it is on this rank
                start, stop, held = 0, 0, zero.single_partition_of_fp32_groups[0]
            else:  # a part of all parameters joined
                here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                start, stop, address = here.start, here.start + here.numel, there.start
                held = zero.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]
            length = stop - start
            fragments.append(view(name, shape, held, self._adamw, offset=start, address=address, length=length))
        return fragments


class AccelerateEngine:
    """One process, or data parallelism with everything on every rank."""

    def __init__(self, module: nn.Module, *, scale: Scale, optim: Optim, micro_batch_size: int, num_micro_batches: int):
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",  # autocast is ours, the same under both engines
            gradient_accumulation_steps=num_micro_batches,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )
        self._module, self._max_grad_norm, self._num_micro_batches = module, optim.max_grad_norm, num_micro_batches
        self._pending: list[tuple[dict[str, Tensor], Sequence[str]]] = []
        self.steps = 0
        self._adamw = _adamw(module, optim)
        self._wrapped = self._accelerator.prepare_model(_Autocast(module, scale))
        self.device = self._accelerator.device
        self._fragments = [view(n, p.shape, p, self._adamw, length=p.numel()) for n, p in module.named_parameters()]

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        last = len(self._pending) + 1 == self._num_micro_batches
        with contextlib.nullcontext() if last else self._accelerator.no_sync(self._wrapped):
            return self._wrapped(batch)

    def step(
        self, losses: dict[str, Tensor], *, keys: Sequence[str], lr: float, before_update: Callable[[], None] = _nothing
    ) -> Metrics | None:
        self._pending.append(({name: loss.detach() for name, loss in losses.items()}, keys))
        self._accelerator.backward(total(losses))  # divides by the number of micro-batches
        if len(self._pending) < self._num_micro_batches:
            return None
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        pending, self._pending = self._pending, []
        try:
            metrics = agree(pending, squared_norm(gradients, shared=True), self.steps)
            before_update()
        except FloatingPointError:
            self._adamw.zero_grad()
            raise
        clip(gradients, metrics["grad_norm"], self._max_grad_norm)
        self.steps += 1
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad()
        return metrics

    def state(self) -> list[Fragment]:
        return [f.share(self._accelerator.process_index, self._accelerator.num_processes) for f in self._fragments]

    def load(self, read: Read, *, steps: int) -> None:
        load_state(self._fragments, self._adamw, self._module, read, steps)
        for fragment in self._fragments:
            fragment.weight.copy_(read("weight", fragment.name, 0, fragment.weight.numel()))
        self.steps = steps

    def unwrap(self) -> nn.Module:
        return self._module


class _Autocast(nn.Module):
    """What the engines wrap: the module, under autocast where asked; DeepSpeed disables one around its engine."""

    def __init__(self, module: nn.Module, scale: Scale):
        super().__init__()
        self.module = module
        self.device_type = "cuda" if torch.cuda.is_available() else "cpu"
        self.enabled = scale.precision == "bfloat16" or (scale.precision == "auto" and self.device_type == "cuda")
        self.cache = scale.zero_stage != 3  # stage 3 frees weights after use, and so must autocast its copies

    def forward(self, batch: Signal) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.enabled, cache_enabled=self.cache):
            return self.module(batch)


def _adamw(module: nn.Module, optim: Optim) -> torch.optim.AdamW:
    trainable = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)


def recompute_blocks(module: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    lists: list[str] = []
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            for block in child:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if not lists:
        logger.warning("scale.activation_checkpointing=True is ignored: %s has no nn.ModuleList", type(module).__name__)


def _has_compiler() -> bool:
    found = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
    if not found and is_first():
        logger.warning("scale.compile=True is ignored: no C++ compiler (g++ or clang++) was found; running uncompiled")
    return found
