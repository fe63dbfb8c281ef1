"""Time from the kill of a worker to the next training step, under Ray on this machine.

python benchmarks/recovery.py --kills 10
"""

import argparse
import os
import signal
import statistics
import tempfile
import time

from distributed_inr import pipeline
from distributed_inr.config import override
from distributed_inr.launch import Worker, launcher
from distributed_inr.presets.ddmi import PRESETS
from distributed_inr.run_folder import Stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how often a worker is killed (default: 10)")
    parser.add_argument("--steps", type=int, default=15, help="steps between kills (default: 15)")
    arguments = parser.parse_args()
    kills, steps, batch = arguments.kills, arguments.steps, 8
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "output": folder,
            "autoencoder_training.num_samples": (kills + 1) * steps * batch,
            "autoencoder_training.checkpoint_every_samples": 5 * batch,
            "scale.max_failures": kills,
        }
        experiment = override(PRESETS["furniture-image"](), changes)
        stage = Stage(experiment.folder / "autoencoder", {})
        stage.folder.mkdir(parents=True)
        stage.begin({})
        times = stage.folder / "times"
        times.mkdir()

        def work(worker: Worker) -> None:
            from distributed_inr.training.engine import DeepSpeedEngine

            take_step, start, first = DeepSpeedEngine.step, len(list(times.glob("kill-*"))), True

            def step(engine, *args, **kwargs):
                nonlocal first
                due = engine.steps == (start + 1) * steps and start < kills
                if due and worker.rank == start % worker.world:
                    (times / f"kill-{start}").write_text(str(time.time()))
                    os.kill(os.getpid(), signal.SIGKILL)
                metrics = take_step(engine, *args, **kwargs)
                if first and worker.rank == 0:
                    (times / f"step-{start}").write_text(str(time.time()))
                first = False
                return metrics

            DeepSpeedEngine.step = step
            (times / f"begin-{start}-{worker.rank}").write_text(str(time.time()))
            pipeline.fit_autoencoder(worker, experiment=experiment, stage=stage)

        with launcher(experiment.scale) as place:
            place.run(work, title="recovery", folder=stage.folder, stoppable=True)

        def read(name: str) -> float:
            return float((times / name).read_text())

        started = [read(f"begin-{k + 1}-0") - read(f"kill-{k}") for k in range(kills)]
        stepped = [read(f"step-{k + 1}") - read(f"kill-{k}") for k in range(kills)]
    for what, seconds in (("worker functions run again", started), ("next step done", stepped)):
        print(f"kill to {what}: median {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s of {kills}")


if __name__ == "__main__":
    main()
