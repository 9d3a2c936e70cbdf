"""Contact sheets: pictures in a grid, each with its prompt under it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["contact_sheet"]

_SIDE, _GAP, _LINE, _LINES, _WIDTH = 192, 8, 12, 7, 31


def contact_sheet(pictures: Tensor, prompts: Sequence[str], columns: int = 8) -> Image.Image:
    """uint8 pictures [b, 3, h, w] and their prompts as one picture; each prompt has room for about 200 characters.

    Raises:
        ValueError: the numbers differ.
    """
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(pictures)} pictures but {len(prompts)} prompts")
    columns = min(columns, len(prompts))
    across, down = _SIDE + _GAP, _SIDE + _GAP + _LINES * _LINE
    sheet = Image.new("RGB", (columns * across + _GAP, -(-len(prompts) // columns) * down + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = _GAP + i % columns * across, _GAP + i // columns * down
        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (x, y))
        for k, line in enumerate(textwrap.wrap(prompt, _WIDTH)[:_LINES]):
            pen.text((x, y + _SIDE + k * _LINE), line, fill="black", font=font)
    return sheet
