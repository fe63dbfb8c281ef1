"""Draw functions from a finished run and write them as files of any resolution.

python jobs/sample.py runs/ddmi/furniture-image --count 16 --resolution 512 --seed 7
python jobs/sample.py runs/ddmi/furniture-shape --count 4 --resolution 128 --format ply
python jobs/sample.py runs/chinr/furniture-image --count 4 --fix-layers 2 --branches 4
"""

import argparse
import typing
from pathlib import Path

from distributed_inr.config import Parser, command
from distributed_inr.files import sample_files
from distributed_inr.generation import load
from distributed_inr.models.noising import Sampler


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/ddmi/furniture-image")
    parser.add_argument("--count", type=int, default=16, help="how many (default: 16)")
    parser.add_argument("--resolution", type=int, help="pixels, cells or frames a side (default: the run's own)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws others (default: 0)")
    parser.add_argument("--steps", type=int, help="network evaluations a sample (default: the run's sampling.steps)")
    parser.add_argument("--sampler", choices=typing.get_args(Sampler), help="default: the run's sampling.sampler")
    parser.add_argument("--out", type=Path, help="folder (default: samples in RUN, or here where RUN is read-only)")
    parser.add_argument("--fix-layers", type=int, help="hold so many first layers of each sample and redraw the rest")
    parser.add_argument("--branches", type=int, help="with --fix-layers: how often (default: 4)")
    parser.add_argument("--format", metavar="SUFFIX", help="kind of file, such as ply or gif (default: the domain's)")
    parser.add_argument("--frames", type=int, help="of clips and of films around scenes (default: the run's own)")
    parser.add_argument("--width", type=int, help="of clips, in pixels (default: the resolution, which is the height)")
    parser.add_argument("--fps", type=float, help="frames a second of the file (default: as long as the clip was)")
    given = parser.parse_args()
    options = {"frames": given.frames, "width": given.width, "fps": given.fps}
    paths = sample_files(
        load(given.run),
        given.out,
        count=given.count,
        resolution=given.resolution,
        seed=given.seed,
        steps=given.steps,
        sampler=given.sampler,
        fix_layers=given.fix_layers,
        branches=given.branches,
        suffix=given.format,
        options=options,
    )
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
