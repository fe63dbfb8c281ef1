"""Train DDMI: fit the autoencoder, write latents, fit the diffusion model, sample and evaluate.

python jobs/train_ddmi.py                                                     # bundled pictures, a local Ray
python jobs/train_ddmi.py celebahq-256 --data.train s3://bucket/celebahq/train --scale.num-workers 16
ray job submit -- python jobs/train_ddmi.py afhqv2-cat-256                    # on a running cluster

The same command again goes on with an interrupted run, and skips what is complete.
"""

import sys

from distributed_inr import pipeline
from distributed_inr.config import command, parse
from distributed_inr.presets import PRESETS


@command
def main() -> None:
    experiment = parse(sys.argv[1:], PRESETS["ddmi"], default="furniture-image", description=__doc__ or "")
    for name, path in pipeline.run(experiment).items():
        print(f"{name:20} {path}")


if __name__ == "__main__":
    main()
