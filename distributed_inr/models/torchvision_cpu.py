"""Import torchvision also where its compiled operators do not load.

The usual torchvision wheel is built against CUDA. Beside a CPU build of torch its operator library does not load, and
the import ends with "operator torchvision::nms does not exist". The libraries that we use (diffusers, timm, open_clip,
torch-fidelity) import torchvision but need none of those operators, so declaring their schemas is enough.
"""

import importlib
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_torchvision() -> None:
    """Import torchvision, declaring its operators if they do not load. Call before libraries that import it."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            library.define(schema)
        _LIBRARIES.append(library)
        importlib.import_module("torchvision")


_LIBRARIES: list[torch.library.Library] = []
"""Keeps the declarations alive: they end with their Library object."""
