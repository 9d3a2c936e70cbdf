"""Plots and the page of `mmdit bench samplers`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmdit.utils import replacing

SIDE, GAP, LABEL, BLOCKS = 84, 2, 180, 3  # of the page: pixels, and how many blocks stand side by side


def needs_matplotlib() -> Any:
    """matplotlib's pyplot, drawing into files.

    Raises:
        ImportError: it is not installed; the extra is named.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib, which is not installed: pip install "mmdit-lab[plots]"') from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def curves(lines: Mapping[str, Sequence[tuple[int, float]]], kinds: Mapping[str, str], path: Path) -> Path:
    """Error against calls of the model, both logarithmic.

    Args:
        lines: (calls, error) of every sampler.
        kinds: what each steps in: one dash each.
        path: where to write.
    """
    plots = needs_matplotlib()
    dashes = {"sigma": "-", "log_snr": "--", "variance_exploding": ":"}
    figure, axes = plots.subplots(figsize=(11, 7), layout="constrained")
    for i, (name, points) in enumerate(lines.items()):
        calls, errors = zip(*sorted(points), strict=True)
        axes.plot(
            calls, errors, dashes[kinds[name]], color=plots.cm.tab20(i % 20), marker="o", markersize=3, label=name
        )
    axes.set(xscale="log", yscale="log", xlabel="calls of the model", ylabel="relative error of the final latent")
    axes.set_title("steps in sigma: solid; in ln((1 - sigma) / sigma): dashed; in -ln sigma: dotted", fontsize=10)
    ticks = [2**k for k in range(1, 10) if any(2**k <= 1.5 * calls for points in lines.values() for calls, _ in points)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _saved(plots, figure, path)


def heat_map(values: Mapping[tuple[str, str], float], title: str, path: Path) -> Path:
    """Shares by (row, column) as colours and percent.

    Args:
        values: from 0 to 1; what is missing stays white.
        title: of the map.
        path: where to write.
    """
    plots = needs_matplotlib()
    rows, columns = (list(dict.fromkeys(key[axis] for key in values)) for axis in (0, 1))
    shown = [[100 * values.get((row, column), float("nan")) for column in columns] for row in rows]
    size = (3 + 0.9 * len(columns), 1.5 + 0.24 * len(rows))
    figure, axes = plots.subplots(figsize=size, layout="constrained")
    axes.imshow(shown, vmin=0, vmax=100, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    for i, row in enumerate(shown):
        for j, value in enumerate(row):
            axes.text(
                j, i, f"{value:.0f}", ha="center", va="center", fontsize=6, color="black" if value > 60 else "white"
            )
    figure.suptitle(title, fontsize=8, wrap=True)
    return _saved(plots, figure, path)


def page(pictures: Mapping[tuple[str, str], Image.Image], title: str, path: Path, red: Collection[str] = ()) -> Path:
    """Pictures by (row, column) with their names, in 256 colours; the rows stand in several blocks side by side.

    Args:
        pictures: of any size.
        title: above all.
        path: where to write.
        red: rows whose names are red.
    """
    rows, columns = (list(dict.fromkeys(key[axis] for key in pictures)) for axis in (0, 1))
    tall, across, down = -(-len(rows) // BLOCKS), LABEL + len(columns) * (SIDE + GAP), SIDE + GAP
    blocks = -(-len(rows) // tall)
    sheet = Image.new("RGB", (blocks * across + GAP, 32 + tall * down), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    pen.text((GAP, 2), title, fill="black", font=font)
    for block in range(blocks):
        for j, column in enumerate(columns):
            pen.text((block * across + LABEL + j * down, 17), column, fill="black", font=font)
    for i, row in enumerate(rows):
        x, y = i // tall * across, 32 + i % tall * down
        pen.text((x + GAP, y + SIDE // 2 - 6), row, fill="red" if row in red else "black", font=font)
        for j, column in enumerate(columns):
            image = pictures[row, column].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(image, (x + LABEL + j * down, y))
    with replacing(path) as part:
        sheet.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
            part, format="png", optimize=True
        )
    return path


def _saved(plots: Any, figure: Any, path: Path) -> Path:
    with replacing(path) as part:
        figure.savefig(part, dpi=110, format="png")
    plots.close(figure)
    return path
