"""Text in a diffusion model: what a network attends to, and how a sample is guided towards it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distributed_inr.domains import Signal

_HEADS = 4


@dataclass(frozen=True)
class TextCondition:
    """Embedded prompts, one for each sample of a batch.

    Attributes:
        tokens: padded to one length.
        mask: True where there is a token; what lies elsewhere has no influence.
    """

    tokens: Float[Tensor, "batch tokens width"]
    mask: Bool[Tensor, "batch tokens"]

    @staticmethod
    def of(signal: Signal) -> "TextCondition | None":
        """That of a batch of training samples, where it has one."""
        if signal.text_tokens is None or signal.text_mask is None:
            return None
        return TextCondition(signal.text_tokens, signal.text_mask)

    @staticmethod
    def of_rows(rows: Sequence[Float[Tensor, "_ width"]]) -> "TextCondition":
        """Prompts of so many tokens each."""
        lengths = torch.tensor([len(row) for row in rows])
        tokens = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        return TextCondition(tokens, torch.arange(tokens.shape[1]) < lengths[:, None])

    def to(self, device: torch.device | str) -> "TextCondition":
        return TextCondition(self.tokens.to(device), self.mask.to(device))

    def rows(self, index: slice | Tensor) -> "TextCondition":
        """Some of them."""
        return TextCondition(self.tokens[index], self.mask[index])

    def repeated(self, count: int) -> "TextCondition":
        """Each so many times, one after the other."""
        return TextCondition(self.tokens.repeat_interleave(count, 0), self.mask.repeat_interleave(count, 0))

    def with_others(self, other: "TextCondition") -> "TextCondition":
        """These, and then others; all padded to the longer length."""
        longest = max(self.mask.shape[1], other.mask.shape[1])
        padded = [part._padded(longest) for part in (self, other)]
        return TextCondition(torch.cat([p.tokens for p in padded]), torch.cat([p.mask for p in padded]))

    def _padded(self, length: int) -> "TextCondition":
        more = length - self.mask.shape[1]
        return TextCondition(
            nn.functional.pad(self.tokens, (0, 0, 0, more)), nn.functional.pad(self.mask, (0, more), value=False)
        )


@dataclass(frozen=True)
class Guidance:
    """What samples are drawn towards, and away from: a row for each sample, or one for all.

    Attributes:
        text: the prompts.
        negative: the empty prompt, or what samples are to be unlike.
        scale: w of classifier-free guidance (Ho and Salimans, 2022): 1 follows the prompt as training did, 0 leaves it
            out, more exaggerates what tells it from `negative`.
        interval: of t / T, where there is guidance; elsewhere w = 1 (Kynkaanniemi et al., 2024).
        rescale: in [0, 1], how far the deviation of the guided prediction is brought back to that of the conditional
            one (Lin et al., 2024, section 3.4).
    """

    text: TextCondition
    negative: TextCondition
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __len__(self) -> int:
        return len(self.text.mask)

    def to(self, device: torch.device | str) -> "Guidance":
        return Guidance(self.text.to(device), self.negative.to(device), self.scale, self.interval, self.rescale)

    def rows(self, index: slice | Tensor) -> "Guidance":
        """That of some of the samples."""
        return Guidance(self.text.rows(index), self.negative.rows(index), self.scale, self.interval, self.rescale)


Predict = Callable[..., Tensor]
"""(noisy [batch, ...], timesteps [batch], and a TextCondition where there is text) to the prediction [batch, ...]. The
batch may be the samples twice.
"""


def guided(
    predict: Predict, guidance: Guidance | None, *, count: int, num_timesteps: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The prediction e(empty) + w (e(text) - e(empty)) (DDMI, section 4.1), from one pass over both.

    It is the same for predictions of the noise, the velocity and the clean latent, since these are affine in each
    other. All timesteps of a call must be equal.

    Args:
        count: samples of a batch.
    """
    if guidance is None:
        return predict
    if len(guidance) == 1:
        guidance = guidance.rows(torch.zeros(count, dtype=torch.int64))
    text, negative = guidance.text, guidance.negative
    both = text.with_others(negative)
    first, last = guidance.interval

    def denoise(noisy: Tensor, timesteps: Tensor) -> Tensor:
        scale = guidance.scale if first <= float(timesteps[0]) / num_timesteps <= last else 1.0
        if scale == 1:
            return predict(noisy, timesteps, text)
        if scale == 0:
            return predict(noisy, timesteps, negative)
        twice = predict(torch.cat([noisy, noisy]), timesteps.repeat(2), both).float()
        conditional, unconditional = twice.chunk(2)
        found = unconditional + scale * (conditional - unconditional)
        if guidance.rescale:
            over = tuple(range(1, found.dim()))
            matched = found * (conditional.std(over, keepdim=True) / found.std(over, keepdim=True).clamp(min=1e-8))
            found = guidance.rescale * matched + (1 - guidance.rescale) * found
        return found

    return denoise


class TextAttention(nn.Module):
    """Cross-attention of a network's conditioning vector to a prompt's tokens; what is found is added to it.

    For networks over vectors, which have no places that could attend by themselves. The vector knows the timestep (and
    the layer, in hierarchical diffusion), so that other words may matter early than late.
    """

    def __init__(self, dim: int, text_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_dim)
        self.attention = nn.MultiheadAttention(dim, _HEADS, kdim=text_dim, vdim=text_dim, batch_first=True)

    def forward(self, vector: Float[Tensor, "batch dim"], text: TextCondition) -> Float[Tensor, "batch dim"]:
        tokens = self.norm(text.tokens.to(vector.dtype))
        found, _ = self.attention(vector[:, None], tokens, tokens, key_padding_mask=~text.mask, need_weights=False)
        return vector + found[:, 0]
