"""Sweep beta_z, the weight of the D2C-VAE's KL term: what it costs in error, and gains in samples.

python jobs/tune_ddmi.py                                     # four weights on bundled pictures, a local Ray
python jobs/tune_ddmi.py --seeds 3 --preset furniture-image --name beta-z-long
python jobs/tune_ddmi.py --space tune_spaces/latent_denoiser.py --search optuna --num-samples 20
ray job submit -- python jobs/tune_ddmi.py --scale.num-workers 4        # on a running cluster

A trial is judged by its samples (KID) after the prior is trained. The same command again goes on with an interrupted
sweep; any field of the experiment is a flag too.
"""

import sys

from distributed_inr.config import command
from distributed_inr.sweeps.study import BETA_Z
from distributed_inr.sweeps.sweep import main as sweep


@command
def main() -> None:
    print(sweep(sys.argv[1:], BETA_Z, description=__doc__ or ""))


if __name__ == "__main__":
    main()
