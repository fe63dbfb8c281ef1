"""One's own files as functions: encode them with a finished run and write them at any resolution.

python jobs/reconstruct.py runs/ddmi/furniture-image chair.png table.jpg --resolution 1024
python jobs/reconstruct.py runs/ddmi/furniture-shape chair.glb --resolution 256 --format obj
"""

import argparse
from pathlib import Path

from distributed_inr.config import Parser, command
from distributed_inr.files import reconstruct_files
from distributed_inr.generation import load


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run folder, such as runs/ddmi/furniture-image")
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="pictures, meshes, clips, ..., as the run has"
    )
    parser.add_argument("--resolution", type=int, help="pixels, cells or frames a side (default: the run's own)")
    parser.add_argument("--out", type=Path, help="folder (default: reconstructions in RUN, or here if it is read-only)")
    parser.add_argument("--format", metavar="SUFFIX", help="kind of file, such as ply or gif (default: the domain's)")
    parser.add_argument("--frames", type=int, help="of clips and of films around scenes (default: the run's own)")
    parser.add_argument("--width", type=int, help="of clips, in pixels (default: the resolution, which is the height)")
    parser.add_argument("--fps", type=float, help="frames a second of the file (default: as long as the clip was)")
    given = parser.parse_args()
    options = {"frames": given.frames, "width": given.width, "fps": given.fps}
    paths = reconstruct_files(
        load(given.run),
        given.files,
        given.out,
        resolution=given.resolution,
        suffix=given.format,
        options=options,
    )
    print(*paths, sep="\n")


if __name__ == "__main__":
    main()
