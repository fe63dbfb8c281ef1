"""The run of fault_runs.py as a program of its own: python tests/fault_job.py FOLDER '{"name": "whole", ...}'."""

import functools
import json
import sys
from pathlib import Path

from fault_runs import fit, make_experiment, stage_of

from distributed_inr.launch import launcher


def main() -> None:
    experiment = make_experiment(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    stage = stage_of(experiment)
    with launcher(experiment.scale) as place:
        work = functools.partial(fit, experiment=experiment)
        place.run(work, title=experiment.name, folder=stage.folder, stoppable=True)


if __name__ == "__main__":
    main()
