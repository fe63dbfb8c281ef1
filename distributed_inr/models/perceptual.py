"""LPIPS: a distance between pictures on the features of a trained image network (Zhang et al., 2018)."""

import functools
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distributed_inr.models.torchvision_cpu import import_torchvision

Network = Literal["alex", "squeeze", "vgg"]


def lpips(
    a: Float[Tensor, "batch 3 height width"],
    b: Float[Tensor, "batch 3 height width"],
    *,
    network: Network,
    weights: str,
) -> Float[Tensor, " batch"]:
    """LPIPS of pictures in [-1, 1]; gradients flow to both. `weights`: path of torchvision's checkpoint."""
    return load_network(network, weights, a.device)(a, b).flatten()


@functools.cache
def load_network(network: Network, weights: str, device: torch.device) -> nn.Module:
    """Frozen, and outside the trained module, so that neither checkpoints nor optimizer know of it."""
    import_torchvision()
    from torchmetrics.functional.image.lpips import _NoTrainLpips  # its linear heads come with the package

    if not Path(weights).is_file():
        raise ValueError(
            f"autoencoder.perceptual_checkpoint={weights} is not a file; give torchvision's checkpoint of the network "
            "(autoencoder.perceptual_network), such as vgg16-397923af.pth"
        )
    model = _NoTrainLpips(net=network, pnet_rand=True)
    trained = read_tensors(Path(weights))
    features: Any = model.net
    slices = features.slices if network == "squeeze" else [getattr(features, f"slice{i}") for i in range(1, 6)]
    try:
        for part in slices:
            for index, layer in part.named_children():
                layer.load_state_dict({name: trained[f"features.{index}.{name}"] for name in layer.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{weights} does not hold the features of {network} (autoencoder.perceptual_network): {error}; "
            "give torchvision's checkpoint of that network"
        ) from None
    return model.to(device).requires_grad_(False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A published torch checkpoint. It is a pickle: whatever it holds beside tensors is refused and never run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise nearly anything; torch's own remedy is to run the file
        found = error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(
            f"{path} is not a torch checkpoint of tensors alone; it was not run: download it again from its publisher"
        )
    return found
