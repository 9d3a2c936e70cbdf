"""Plots and the page of `mmdit bench samplers`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mmdit.utils import replacing

SIDE, GAP, BETWEEN, BLOCKS = 84, 6, 24, 3  # of the page: pixels, and how many blocks stand side by side
COLUMNS = 4  # of the panels of `curves`
MARKERS, DASHES = "osD^vPX*", ("-", "--", "-.", ":")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")  # Okabe and Ito's


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


def curves(lines: Mapping[str, Sequence[tuple[int, float]]], families: Mapping[str, str], path: Path) -> Path:
    """Error against calls of the model, both logarithmic: one panel for each family, with all other lines in grey.

    Within a panel each line has a marker and a dash of its own, so that no line is told by its colour alone. Samplers
    with the same numbers, to three digits, share a line.

    Args:
        lines: (calls, error) of every sampler.
        families: the title of the panel of every sampler.
        path: file to write.
    """
    plots = needs_matplotlib()
    titles = list(dict.fromkeys(families[name] for name in lines))
    tall = -(-len(titles) // COLUMNS)
    size = (COLUMNS * 4.2, 0.6 + tall * 3.6)
    figure, axes = plots.subplots(
        tall, COLUMNS, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, title in zip(axes.flat, titles, strict=False):
        for points in lines.values():
            axis.plot(*zip(*sorted(points), strict=True), color="0.88", linewidth=0.8, zorder=1)
        mine = _same([(name, sorted(points)) for name, points in lines.items() if families[name] == title])
        for i, (label, points) in enumerate(mine):
            look = {"marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
            color = COLORS[i % len(COLORS)]
            axis.plot(*zip(*points, strict=True), color=color, markersize=5, label=label, zorder=2, **look)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7, loc="upper right", handlelength=3.5)
        axis.grid(alpha=0.3)
    _logarithmic(axes.flat[0], [calls for points in lines.values() for calls, _ in points])
    for axis in axes.flat[len(titles) :]:
        axis.set_axis_off()
    for axis in axes.flat[max(len(titles) - COLUMNS, 0) : len(titles)]:
        axis.tick_params(labelbottom=True)
    figure.supxlabel("calls of the model", fontsize=10)
    figure.supylabel("relative error of the final latent", fontsize=10)
    return _saved(plots, figure, path)


def _logarithmic(axis: Any, calls: Sequence[int]) -> None:
    """Both scales, with ticks at powers of 2 along the calls; panels share them."""
    axis.set(xscale="log", yscale="log")
    ticks = [2**k for k in range(12) if min(calls) / 1.5 <= 2**k <= 1.5 * max(calls)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()


def _same(lines: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The lines, with those that have the same points, to three digits, as one."""
    found: dict[tuple[tuple[int, str], ...], tuple[list[str], Any]] = {}
    for name, points in lines:
        key = tuple((calls, f"{error:.2e}") for calls, error in points)
        found.setdefault(key, ([], points))[0].append(name)
    return [(" =\n".join(names), points) for names, points in found.values()]


def heat_map(values: Mapping[tuple[str, str], float], title: str, path: Path) -> Path:
    """Shares by (row, column) as colours and percent.

    Args:
        values: from 0 to 1; what is missing stays white.
        title: title of the map.
        path: file to write.
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


def page(pictures: Mapping[tuple[str, str], Image.Image], title: str, path: Path, marked: Collection[str] = ()) -> Path:
    """Pictures by (row, column) with their names, in 256 colours; the rows stand in several blocks side by side.

    Args:
        pictures: pictures of any size.
        title: title of the page.
        path: file to write.
        marked: rows whose names are red and end with a star.
    """
    rows, columns = (list(dict.fromkeys(key[axis] for key in pictures)) for axis in (0, 1))
    font, names = ImageFont.load_default(size=13), {row: f"{row} *" if row in marked else row for row in rows}
    label = GAP + max(int(font.getlength(name)) for name in names.values()) + GAP
    tall, across, down = -(-len(rows) // BLOCKS), label + len(columns) * (SIDE + GAP) + BETWEEN, SIDE + GAP
    blocks, top = -(-len(rows) // tall), 46
    sheet = Image.new("RGB", (max(blocks * across, int(font.getlength(title)) + 2 * GAP), top + tall * down), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 4), title, fill="black", font=font)
    for block in range(blocks):
        for j, column in enumerate(columns):
            pen.text((block * across + label + j * down + SIDE // 2, top - 5), column, "black", font, anchor="ms")
    for i, row in enumerate(rows):
        x, y = i // tall * across, top + i % tall * down
        fill = "#c00000" if row in marked else "black"
        pen.text((x + label - GAP - 1, y + SIDE // 2), names[row], fill, font, anchor="rm")
        for j, column in enumerate(columns):
            image = pictures[row, column].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(image, (x + label + j * down, y))
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
