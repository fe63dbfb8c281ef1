"""What open_clip knows of its models, and of weights for them; nothing here loads any."""

import difflib
from pathlib import Path
from typing import Any

from distributed_inr.models.torchvision_cpu import import_torchvision

_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def model_config(model: str) -> dict[str, Any]:
    """Of a model that open_clip has a name for. Raises ValueError where there is none such."""
    import_torchvision()
    import open_clip

    found = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if found is None:  # such as hf-hub:, whose weights are not those of `pretrained`
        near = difflib.get_close_matches(model, open_clip.list_models(), n=1, cutoff=0.0)
        raise ValueError(f"text.model={model!r} is none of open_clip's models; did you mean {near[0]}?")
    return found


def tags(model: str) -> list[str]:
    """Of weights that open_clip knows where to download."""
    model_config(model)
    import open_clip

    return open_clip.list_pretrained_tags_by_model(model)


def refuse_other_activation(model: str, tag: str) -> None:
    """Weights that were trained with QuickGELU say little with GELU; open_clip has models of their own for them."""
    if _about(model, tag).get("quick_gelu", False) and not _is_quick(model):
        raise ValueError(
            f"text.pretrained={tag} was trained with another activation than text.model={model} has; use "
            f"text.model={model}-quickgelu"
        )


def preprocessing(model: str, weights: str | None) -> dict[str, Any] | None:
    """How a model's image tower was shown pictures, by the names of open_clip's PreprocessCfg, where it may differ from
    its defaults. None for a file of weights of a model whose tags, those of its activation, differ in it.

    Args:
        weights: a tag, or the path of a file, which is one of whatever tag.
    """
    known = tags(model)
    own = [weights] if weights in known and not Path(weights).is_file() else known
    own = [tag for tag in own if _about(model, tag).get("quick_gelu", False) == _is_quick(model)]
    found = [{name: value for name, value in _about(model, tag).items() if name in _PREPROCESSING} for tag in own]
    if any(one != found[0] for one in found):
        return None
    return found[0] if found else {}


def fetch(model: str, weights: str) -> Path:
    """The file of weights, by its path or by a tag, whose file is downloaded if need be."""
    import open_clip

    path = Path(weights).expanduser()
    if path.is_file():
        return path
    try:
        return Path(open_clip.download_pretrained(_about(model, weights)))
    except Exception as error:  # whatever the network and the hub raise
        raise ValueError(
            f"text.pretrained={weights} cannot be downloaded: {short_reason(error)}; fetch the weights of {model} "
            "where there is a network and give their path"
        ) from None


def short_reason(error: Exception) -> str:
    """What an error of another library says, as a part of a line."""
    return " ".join(str(error).split())[:200]


def _is_quick(model: str) -> bool:
    return model_config(model).get("quick_gelu", False)


def _about(model: str, tag: str) -> dict[str, Any]:
    import open_clip

    return open_clip.get_pretrained_cfg(model, tag)
