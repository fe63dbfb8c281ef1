"""Draw functions from a finished run and write them as files of any resolution.

python jobs/sample.py runs/ddmi/furniture-image --count 16 --resolution 512 --seed 7
python jobs/sample.py runs/ddmi/furniture-shape --count 4 --resolution 128 --format ply
python jobs/sample.py runs/chinr/furniture-image --count 4 --fix-layers 2 --branches 4
python jobs/sample.py runs/ddmi/furniture-shape-text --text "a round table" --text "an armchair" --guidance 3
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
    parser.add_argument("--count", type=int, help="how many (default: 16); with text, of each prompt (default: 8)")
    parser.add_argument("--text", action="append", default=[], metavar="PROMPT", help="what to draw; repeatable")
    parser.add_argument("--text-file", type=Path, help="file with a prompt a line; blank lines are passed over")
    parser.add_argument("--negative-text", metavar="PROMPT", help="what samples are to be unlike (default: nothing)")
    parser.add_argument(
        "--guidance", type=float, help="scale w; 1 follows the prompt as training did (default: the run's own)"
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        help="of the noising chain, from 0 (clean) to 1, where there is guidance (default: the run's own)",
    )
    parser.add_argument(
        "--guidance-rescale", type=float, help="0 to 1: keep the deviation of unguided predictions (default: the run's)"
    )
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
        text=prompts(given.text, given.text_file),
        negative_text=given.negative_text,
        guidance=given.guidance,
        guidance_interval=None if given.guidance_interval is None else tuple(given.guidance_interval),
        guidance_rescale=given.guidance_rescale,
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


def prompts(given: list[str], file: Path | None) -> list[str] | None:
    """Those of the command line, then those of the file; None where neither is given."""
    if file is None:
        return given or None
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--text-file {file} cannot be read: {error}; give a UTF-8 file with a prompt a line"
        ) from None
    if not lines:
        raise ValueError(f"--text-file {file} holds no prompt; write one a line")
    return given + lines


if __name__ == "__main__":
    main()
