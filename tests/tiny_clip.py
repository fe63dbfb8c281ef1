"""A tiny CLIP model that open_clip knows by name, and checkpoints of it with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from distributed_inr.models.text import OpenCLIP
from distributed_inr.models.torchvision_cpu import import_torchvision

NAME = "tiny-clip"
CONTEXT = 12
WIDTH = 16


def tiny_clip(folder: Path, *, seed: int = 0) -> OpenCLIP:
    """The text encoder of random weights that were written to disk."""
    register(folder)
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(NAME)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    path = folder / f"tiny-clip-{seed}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return OpenCLIP(model=NAME, pretrained=str(path))


def register(folder: Path) -> None:
    """Tell open_clip of the model."""
    import_torchvision()
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2}
    path = folder / f"{NAME}.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)
