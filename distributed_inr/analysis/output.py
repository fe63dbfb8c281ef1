"""Where an analysis writes: pictures, and the numbers behind them."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save as serialise
from torch import Tensor

from distributed_inr.files import default_folder, make_folder
from distributed_inr.generation import FieldModel


@dataclass
class Files:
    """A folder that an analysis writes to, and what it has written."""

    model: FieldModel
    name: str
    out: Path | None
    paths: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = make_folder(self.out or default_folder(self.model.folder, "analysis") / self.name)

    @property
    def run(self) -> str:
        return f"{self.model.experiment.family}/{self.model.experiment.name}"

    def picture(self, name: str, picture: Image.Image | Figure) -> None:
        path = self._path(name)
        if isinstance(picture, Figure):
            picture.savefig(path)
        else:
            picture.save(path)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of one form as CSV; floats with six digits."""
        with self._path(name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    def json(self, name: str, options: Mapping[str, Any], **values: Any) -> None:
        """What was asked for, and what was found."""
        content = {"analysis": self.name, "run": self.run, "options": dict(options), **values}
        self._path(name).write_text(json.dumps(content, indent=1) + "\n")

    def tensors(self, name: str, **tensors: Tensor) -> None:
        self._path(name).write_bytes(serialise({key: value.contiguous() for key, value in tensors.items()}))

    def _path(self, name: str) -> Path:
        self.paths.append(self.folder / name)
        return self.paths[-1]


def codes(bits: Float[Tensor, "rows bits"]) -> list[str]:
    """Conditions as words of 0 and 1, such as "010110"."""
    return ["".join(str(int(bit)) for bit in row) for row in bits]
