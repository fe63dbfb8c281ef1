"""Sheets: pictures in a grid with titles and labels."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distributed_inr.domains.image import to_pillow

_FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
"""It has Greek, Cyrillic, Arabic and Hebrew letters, unlike Pillow's own."""


def fit(picture: Float[Tensor, "3 height width"], size: int) -> Image.Image:
    """A picture in [0, 1] of so many pixels' height to look at: reduced by Lanczos, enlarged by repeating pixels."""
    image = to_pillow(picture)
    shape = (max(1, round(image.width * size / image.height)), size)
    return image.resize(shape, Image.Resampling.LANCZOS if image.height > size else Image.Resampling.NEAREST)


def titled(text: str) -> str:
    """A title of a row or a column in at most five short lines."""
    return "\n".join(textwrap.wrap(text, 20, max_lines=5, placeholder="..."))


def in_rows(pictures: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    """Pictures for a sheet that is about as wide as high, with at most 8 in a row."""
    columns = min(8, max(1, round(len(pictures) ** 0.5)))
    return [pictures[i : i + columns] for i in range(0, len(pictures), columns)]


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    *,
    labels: Sequence[Sequence[str]] | None = None,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    title: str = "",
) -> Image.Image:
    """Pictures of one height in a grid on white, with a label under each and titles at the top and the left."""
    cell = max((picture.width for row in rows for picture in row), default=1)
    height = max((picture.height for row in rows for picture in row), default=1)
    font = ImageFont.truetype(_FONT, size=max(14, height // 24))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def extent(text: str) -> tuple[int, int]:
        left, top, right, bottom = measure.multiline_textbbox((0, 0), text, font=font)
        return round(right - left), round(bottom - min(top, 0))

    gap = 6
    left = gap + (max(extent(text)[0] for text in row_titles) + 2 * gap if row_titles else 0)
    head = gap + (extent(title)[1] + 2 * gap if title else 0)
    top = head + (max(extent(text)[1] for text in column_titles) + gap if column_titles else 0)
    under = max((extent(text)[1] + gap for row in labels or () for text in row if text), default=0)
    columns = max(len(row) for row in rows)
    width = max(left + columns * (cell + gap), (extent(title)[0] + 2 * gap) if title else 0)
    canvas = Image.new("RGB", (width, top + len(rows) * (height + under + gap)), "white")
    draw = ImageDraw.Draw(canvas)

    if title:
        draw.multiline_text((gap, gap), title, fill="black", font=font)
    for column, text in enumerate(column_titles or ()):
        draw.multiline_text((left + column * (cell + gap) + cell / 2, head), text, "black", font, "ma", align="center")
    for index, row in enumerate(rows):
        y = top + index * (height + under + gap)
        if row_titles:
            draw.multiline_text((gap, y + height / 2), row_titles[index], "black", font, "lm")
        for column, picture in enumerate(row):
            x = left + column * (cell + gap)
            canvas.paste(picture, (x, y))
            if labels:
                place = (x + cell / 2, y + height + 2)
                draw.multiline_text(place, labels[index][column], "black", font, "ma", align="center")
    return canvas
