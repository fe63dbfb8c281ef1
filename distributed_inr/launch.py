"""Where work runs: a function on every worker of a Ray cluster, through Ray Train, or in the calling process.

With worker.py, the only module that imports ray; the only one that sets environment variables. A worker function takes
a `Worker`. It runs again from its beginning when Ray restarts the workers, so it must resume from what it has written.
"""

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from distributed_inr.allocator import WORKER_ENVIRONMENT, keep_freed_memory
from distributed_inr.console import Bar, exit_if_stopped, kept_handlers, log_file, own_groups, signals
from distributed_inr.training.background import Background
from distributed_inr.training.engine import Scale
from distributed_inr.worker import POLL_SECONDS, Beat, Mail, Worker, kill_process, read_beats, work, write_stacks

logger = logging.getLogger(__name__)

_REACH_SECONDS = 10.0
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the processes that it starts for `ray job submit`

_ENVIRONMENT = {
    # A report blocks its worker until it is collected; collecting takes 4 % of a core at 0.1 s, 1 % at 0.5 s (LOG.md).
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # the notice may come half a minute before the end
    "RAY_worker_niceness": "0",  # Ray's default is 15: any other program on the machine would starve the workers
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a busy machine imports slowly
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # would show every worker's lines twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they meant to the person who typed them
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; without it Ray warns
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(256 * 2**20),  # of a local Ray; next to nothing goes through it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours answers
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # what trials find lies in their own folders
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the report names them
    "RAY_AIR_NEW_OUTPUT": "0",  # which Tune's silence needs
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # tensorboard may import TensorFlow, which talks
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "WDS_SECURE": "1",  # webdataset opens no pipe: addresses and unpickles nothing
}


Observe = Callable[[dict[str, Any]], None]
"""Called with the metrics that a worker function has reported, soon after it has."""


class Launcher(Protocol):
    """Runs worker functions."""

    num_nodes: int
    num_workers: int

    def run(
        self,
        function: Callable[[Worker], None],
        *,
        title: str,
        folder: Path,
        num_workers: int | None = None,
        stoppable: bool = False,
        observe: Observe | None = None,
    ) -> None:
        """Run `function` on `num_workers` workers (default: all), with one progress bar called `title`. A single worker
        without a GPU is the calling process.

        Its log lines go to `folder`/log.txt. Raises ValueError for a user's mistake on any worker, RuntimeError when
        the workers have failed more than `scale.max_failures` times, SystemExit when the user has stopped the run.

        Args:
            stoppable: `function` asks `Worker.stop` and returns when told; otherwise it is ended at once.
            observe: called here with what the first rank reports.
        """
        ...


@contextlib.contextmanager
def launcher(scale: Scale) -> Iterator[Launcher]:
    """The place to run at: the Ray cluster of this job or machine, a local Ray for the time being, or this process."""
    _set_environment()
    if scale.launcher == "none":
        yield _InProcess(scale)
        return
    import ray

    started = not ray.is_initialized()
    if started:
        _check_reachable(os.environ.get("RAY_ADDRESS", ""))
        try:
            # What Ray and its workers print stays in Ray's own logs; our warnings come by mail.
            with own_groups(), kept_handlers():
                ray.init(
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    runtime_env=_runtime_env(),
                )
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(
                f"Ray cannot be reached: {str(error).strip().splitlines()[0]}; check RAY_ADDRESS and the token "
                "(RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH), `ray stop` what is left of an earlier cluster, or use "
                "--scale.launcher none"
            ) from error
        except OSError as error:
            raise ValueError(
                f"Ray cannot start: {error}; it keeps a token in ~/.ray and its files in /tmp/ray: make both writable, "
                "or set HOME and RAY_TMPDIR"
            ) from error
    try:
        yield _OnRay(scale)
    finally:
        if started:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises ValueError where no cluster at host:port answers, or it refuses our token: Ray would try on and on."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        return
    import grpc
    from ray._private.grpc_utils import init_grpc_channel  # with our token, and TLS where it is used
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    request = gcs_service_pb2.GetClusterIdRequest()  # pyright: ignore[reportAttributeAccessIssue]  made at import
    try:
        with contextlib.closing(init_grpc_channel(address)) as channel:
            gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId(request, timeout=_REACH_SECONDS)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ValueError(
                f"Ray at RAY_ADDRESS={address} refuses the token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH "
                "to a file that holds the cluster's (default: ~/.ray/auth_token)"
            ) from None
        raise ValueError(
            f"Ray cannot be reached at RAY_ADDRESS={address}: {error.code().name}; start it (`ray start --head`), set "
            "the address of a cluster that runs, or unset RAY_ADDRESS for a local Ray"
        ) from None


def in_ray_job() -> bool:
    """Whether this process was started by `ray job submit` (in a temporary copy of the working directory)."""
    return _JOB in os.environ


class _InProcess:
    """One worker: the calling process."""

    num_nodes = num_workers = 1

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def run(
        self,
        function: Callable[[Worker], None],
        *,
        title: str,
        folder: Path,
        num_workers: int | None = None,
        stoppable: bool = False,
        observe: Observe | None = None,
    ) -> None:
        keep_freed_memory()
        threads = torch.get_num_threads()
        if self.scale.num_threads is not None:
            torch.set_num_threads(self.scale.num_threads)
        if self.scale.engine == "deepspeed":
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed insists; Accelerate would take it for one of many processes
        try:
            with signals(stoppable=stoppable) as received, Bar(title) as bar, log_file(folder):
                function(Worker(0, 1, observe or (lambda metrics: None), bar.update, lambda: bool(received)))
        except FloatingPointError as error:
            raise ValueError(str(error)) from error
        finally:
            torch.set_num_threads(threads)
            os.environ.pop("LOCAL_RANK", None)
        exit_if_stopped(received)


class _OnRay:
    """Workers of Ray Train; the driver draws the bar and passes on the user's wish to stop."""

    def __init__(self, scale: Scale) -> None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_cpus, num_gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        self.scale = scale
        self.num_nodes = len(nodes)
        self.use_gpu = num_gpus > 0
        self.num_workers = scale.num_workers or int(num_gpus) or 2
        # The driver takes no CPU. Two workers share a single core rather than wait for ever for a second one.
        self.cpus = 1.0 if self.use_gpu else min(1.0, math.floor(100 * num_cpus / self.num_workers) / 100)
        if self.use_gpu and self.num_workers > num_gpus:
            logger.warning(
                "scale.num_workers=%d, but the cluster has %d GPUs: waiting for more", self.num_workers, num_gpus
            )

    def run(
        self,
        function: Callable[[Worker], None],
        *,
        title: str,
        folder: Path,
        num_workers: int | None = None,
        stoppable: bool = False,
        observe: Observe | None = None,
    ) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.config import LoggingConfig

        if num_workers == 1 and not self.use_gpu:
            _InProcess(self.scale).run(function, title=title, folder=folder, stoppable=stoppable, observe=observe)
            return
        world = num_workers or self.num_workers
        mail, scale = Mail(uuid.uuid4().hex), self.scale
        trainer = TorchTrainer(
            functools.partial(
                work,
                function,
                mail=mail,
                scale=scale,
                folder=folder,
                directory=os.getcwd(),
                prepare=_set_environment,
            ),
            scaling_config=ScalingConfig(
                num_workers=world, use_gpu=self.use_gpu, resources_per_worker={"CPU": self.cpus} | self._gpu()
            ),
            torch_config=TorchConfig(timeout_s=scale.timeout_seconds),
            run_config=RunConfig(
                storage_path=str(folder.absolute()),
                name="ray",
                failure_config=FailureConfig(max_failures=scale.max_failures),
                logging_config=LoggingConfig(log_level="CRITICAL"),
                worker_runtime_env={"env_vars": {k: os.environ.get(k, v) for k, v in WORKER_ENVIRONMENT.items()}},
            ),
        )
        try:
            # fit() waits in a thread of its own, so that this one can draw and hear signals.
            with signals(stoppable=stoppable) as received, Bar(title) as bar:
                fitted = Background("fit").submit(trainer.fit)
                watch = _Watch(mail, world, scale.timeout_seconds, folder)
                self._attend(fitted, mail, bar, received, watch, observe)
                mistake, cause, error = mail.get("mistake"), _first_cause(mail), fitted.exception()
        finally:
            mail.close()
        if mistake is not None:
            raise ValueError(mistake)
        if error is not None and not isinstance(error, WorkerGroupError):
            raise error
        if error is not None:
            first = cause or f"a worker died ({error})"
            raise RuntimeError(
                f"{title}: the workers failed, also after scale.max_failures={scale.max_failures} restarts; the newest "
                f"checkpoint is kept, and the same command goes on from it. First cause: {first}"
            )
        shutil.rmtree(folder / "ray", ignore_errors=True)  # our own checkpoints are the only ones
        exit_if_stopped(received)

    def _attend(
        self,
        fitted: "Future[Any]",
        mail: Mail,
        bar: Bar,
        received: list[int],
        watch: "_Watch",
        observe: Observe | None,
    ) -> None:
        attempt = 1
        while wait([fitted], POLL_SECONDS).not_done:
            for text in watch.look():
                bar.say(text)
            if received and mail.get("stop") is None:
                mail.put("stop", True)
            attempt = self._pass_on(mail, bar, attempt, observe)
            if (state := mail.get("progress")) is not None:
                bar.update(*state)
        self._pass_on(mail, bar, attempt, observe)  # what came while the last look waited

    def _pass_on(self, mail: Mail, bar: Bar, attempt: int, observe: Observe | None) -> int:
        """Says restarts and warnings and hands reports on. Returns the attempt that is under way."""
        if (found := mail.get("attempt") or 1) > attempt:
            why = (mail.get(f"cause/{found - 1}") or "a worker died").strip().splitlines()[-1]
            bar.say(f"workers restarted, {found - 1} of at most {self.scale.max_failures} times: {why}")
        for text in mail.take("warnings"):
            bar.say(text)
        for metrics in mail.take("reports"):
            if observe is not None:
                observe(metrics)
        return found

    def _gpu(self) -> dict[str, float]:
        return {"GPU": 1} if self.use_gpu else {}


def _first_cause(mail: Mail) -> str | None:
    """Of the first attempt that could say one."""
    causes = (mail.get(f"cause/{attempt}") for attempt in range(1, 1 + (mail.get("attempt") or 0)))
    return next((cause for cause in causes if cause is not None), None)


class _Watch:
    """Finds workers that hang so that they cannot even say so, kills them, and so has Ray restart all.

    Args:
        timeout_seconds: from when one falls silent to when it is killed and reported, at most.
        folder: where their stacks are written.
    """

    def __init__(self, mail: Mail, world: int, timeout_seconds: int, folder: Path) -> None:
        self.mail, self.world, self.folder = mail, world, folder
        self._pause = max(1.0, world / 50)  # at most 50 letters a second
        # A beat may be a pause old when it is seen, its lack is seen a pause late, and killing takes a second or two.
        self._patience = max(timeout_seconds / 2, timeout_seconds - 2 * (1 + self._pause))
        self._last: dict[int, tuple[Beat, float]] = {}
        self._killing: dict[Any, tuple[Beat, float]] = {}
        self._looked = 0.0

    def look(self) -> list[str]:
        """Lines for the user about workers that were found to hang and are killed."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        now = time.monotonic()
        if now - self._looked >= self._pause:
            self._looked = now
            for beat in read_beats(self.mail, range(self.world)):
                if self._last.get(beat.rank, (None, 0.0))[0] != beat:
                    self._last[beat.rank] = beat, now
                silence = now - self._last[beat.rank][1]
                if silence > self._patience:
                    self.mail.remove(f"beats/{beat.rank}")
                    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
                    task = ray.remote(kill_process).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
                    self._killing[task.remote(beat.pid, beat.started)] = beat, silence
        found = []
        for task in list(self._killing):
            if not ray.wait([task], timeout=0)[0]:
                continue
            beat, silence = self._killing.pop(task)
            with contextlib.suppress(RayError):  # its node is gone, and it too
                if ray.get(task):
                    others = [other for other in read_beats(self.mail, range(self.world)) if other.rank != beat.rank]
                    write_stacks(self.folder, [*others, beat])
                    found.append(
                        f"{beat.place}, and was not heard of for {silence:.0f} s: it is killed; see "
                        f"{self.folder / 'hang.txt'}"
                    )
                    self.mail.put(f"cause/{self.mail.get('attempt')}", found[-1])
        return found


def _set_environment() -> None:
    os.environ |= {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _runtime_env() -> dict[str, Any]:
    """Makes this package importable in the workers where it is neither installed nor brought along by the job."""
    import importlib.metadata

    import distributed_inr

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("distributed_inr")
        return {}
    settings = json.loads(os.environ.get(_JOB, "{}")).get("runtime_env") or {}
    if "working_dir" in settings:
        return {}
    checkout = str(Path(distributed_inr.__file__).parents[1])
    return {"env_vars": {"PYTHONPATH": os.pathsep.join([checkout, *filter(None, [os.environ.get("PYTHONPATH")])])}}
