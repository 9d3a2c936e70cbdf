"""Figures of what was measured: thin functions from arrays to a matplotlib `Figure` (extra `plots`).

Every axis is labelled with its quantity and unit. Colour maps are viridis and cividis, and lines have the colours of
Okabe and Ito, which colour-blind people can tell apart. Figures belong to the caller: `figure.savefig(path)` saves one,
and in a notebook the last value of a cell is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, "Color Universal Design"; black first
OKABE_ITO = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442")
_MARKERS = "osD^vPX*"


def heat_maps(
    picture: object,
    maps: Mapping[str, object],
    *,
    label: str = "share of a patch's attention",
    columns: int = 6,
    shared: bool = False,
    title: str = "",
) -> Figure:
    """A picture, and beside it every map laid over it in grey.

    Args:
        picture: RGB, [h, w, 3] or [3, h, w], in [0, 1] or uint8; or a PIL picture.
        maps: by title, [rows, columns] of any size: each covers the whole picture.
        label: quantity and unit of the numbers.
        columns: number of maps in a line.
        shared: one scale of colours for all maps, to compare them; otherwise each map has its own.
        title: title of the figure.

    Raises:
        ValueError: a map or the picture has another shape, or there is no map.
    """
    image = _picture(picture)
    arrays = {name: _array(one, 2, f"the map {name!r}") for name, one in _some(maps, "maps").items()}
    columns = min(columns, len(arrays))
    figure, axes = _grid(-(-len(arrays) // columns), columns + 1, side=1.9)
    axes[0][0].imshow(image)
    axes[0][0].set_title("picture", fontsize="medium")
    top = max(float(np.nanmax(one)) for one in arrays.values())
    cells = [axis for line in axes for axis in line[1:]]
    for axis, (name, one) in zip(cells, arrays.items(), strict=False):
        _overlay(axis, image, one, top if shared else None)
        axis.set_title(name, fontsize="medium")
    _only([axes[0][0], *cells[: len(arrays)]], axes, "pixels")
    figure.suptitle(title)
    figure.supxlabel(f"colour: {label}", fontsize="medium")
    return figure


def layer_step_grid(
    values: object,
    *,
    label: str,
    steps: Sequence[object] | None = None,
    layers: Sequence[object] | None = None,
    title: str = "",
    across: str = "step",
    down: str = "block",
) -> Figure:
    """A grid with one number for every layer and step.

    Args:
        values: [steps, layers].
        label: quantity and unit of the numbers.
        steps, layers: names along the two axes; None counts from 0.
        title: title of the figure.
        across, down: what the axes count.

    Raises:
        ValueError: `values` has another shape, or the number of names does not fit it.
    """
    array = _array(values, 2, "values")
    figure, [[axis]] = _grid(1, 1, side=4.0)
    shown = axis.imshow(array.T, cmap="cividis", aspect="auto", interpolation="nearest", origin="lower")
    _ticks(axis, "x", across, steps, array.shape[0])
    _ticks(axis, "y", down, layers, array.shape[1])
    axis.set_title(title)
    figure.colorbar(shown, ax=axis, label=label)
    return figure


def lora_norms(norms: Mapping[str, Any], *, relative: bool = True, title: str = "") -> Figure:
    """How much a LoRA changes each weight, by block and module; white where it changes nothing.

    Args:
        norms: what `mmdit.lora_norms` gave.
        relative: over the norm of the weight, else the norm of the change alone.
        title: title of the figure.

    Raises:
        ValueError: there are no norms.
    """
    from mmdit.checkpoints.lora_describe import block_of  # plots of plain numbers need no checkpoints

    cells = {block_of(key): one.relative if relative else one.change for key, one in norms.items()}
    blocks, modules = (list(dict.fromkeys(side)) for side in zip(*_some(cells, "norms"), strict=True))
    array = np.array([[cells.get((block, module), np.nan) for block in blocks] for module in modules])
    figure, [[axis]] = _grid(1, 1, side=5.0)
    shown = axis.imshow(array, cmap="cividis", aspect="auto", interpolation="nearest", vmin=0)
    short = [block.removeprefix("transformer.") or "(outer)" for block in blocks]
    _ticks(axis, "x", "block", short, len(blocks))
    _ticks(axis, "y", "tensor", [module.removesuffix(".weight") for module in modules], len(modules))
    axis.set_title(title)
    figure.colorbar(shown, ax=axis, label="norm of change / norm of weight" if relative else "norm of change")
    return figure


def head_grid(
    maps: object,
    *,
    label: str = "share of a patch's attention",
    columns: int = 8,
    titles: Sequence[str] | None = None,
) -> Figure:
    """The maps of all heads, on one scale of colours.

    Args:
        maps: [heads, rows, columns].
        label: quantity and unit of the numbers.
        columns: number of heads in a line.
        titles: one per head; None counts from 0.

    Raises:
        ValueError: `maps` has another shape, or the number of titles does not fit it.
    """
    array = _some(_array(maps, 3, "maps"), "heads")
    names = [f"head {i}" for i in range(len(array))] if titles is None else list(titles)
    if len(names) != len(array):
        raise ValueError(f"{len(names)} titles for {len(array)} heads")
    columns = min(columns, len(array))
    figure, axes = _grid(-(-len(array) // columns), columns, side=1.5)
    cells = [axis for line in axes for axis in line][: len(array)]
    for axis, name, one in zip(cells, names, array, strict=True):
        shown = axis.imshow(one, cmap="viridis", vmin=0, vmax=float(np.nanmax(array)))
        axis.set_title(name, fontsize="small")
    _only(cells, axes, "patches")
    figure.colorbar(shown, ax=cells, label=label, shrink=0.8)
    return figure


def spectra(values: Mapping[str, object], *, label: str = "singular value", relative: bool = True) -> Figure:
    """Singular values, from the largest to the smallest.

    Args:
        values: by name, [n] of any order and length.
        label: quantity of the singular values.
        relative: divide each spectrum by its largest value.

    Raises:
        ValueError: a spectrum has another shape, or there is none.
    """
    figure, [[axis]] = _grid(1, 1, side=4.0)
    for (name, one), style in zip(_some(values, "spectra").items(), _styles(len(values)), strict=True):
        array = np.sort(_array(one, 1, name))[::-1]
        places = np.arange(1, len(array) + 1)
        axis.plot(places, array / array[0] if relative else array, label=name, **style, markevery=0.1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("rank, from 1")
    axis.set_ylabel(f"{label} / the largest" if relative else label)
    axis.legend()
    return figure


def error_by_layer(
    values: Mapping[str, object],
    *,
    label: str,
    layers: Sequence[object] | None = None,
    intervals: Mapping[str, object] | None = None,
    log: bool = False,
    across: str = "block",
) -> Figure:
    """A number for every layer, a line for every way of computing.

    Args:
        values: by name, [layers].
        label: quantity and unit of the numbers, such as "error / bfloat16's" or "signal to noise, dB".
        layers: names of the layers; None counts from 0.
        intervals: by name, [2, layers], the lowest and highest value.
        log: use a logarithmic axis.
        across: what the axis of layers counts.

    Raises:
        ValueError: a line has another shape or length than the others, or there is none.
    """
    figure, [[axis]] = _grid(1, 1, side=4.0)
    arrays = {name: _array(one, 1, name) for name, one in _some(values, "lines").items()}
    if len(sizes := {len(one) for one in arrays.values()}) > 1:
        raise ValueError(f"lines of different lengths: {sorted(sizes)}")
    for (name, array), style in zip(arrays.items(), _styles(len(arrays)), strict=True):
        axis.plot(np.arange(len(array)), array, label=name, **style)
        if intervals is not None and name in intervals:
            low, high = _array(intervals[name], 2, f"the interval of {name}")
            axis.fill_between(np.arange(len(array)), low, high, color=style["color"], alpha=0.2, linewidth=0)
    if log:
        axis.set_yscale("log")
    _ticks(axis, "x", across, layers, sizes.pop())
    axis.set_ylabel(label)
    axis.legend()
    return figure


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "mmdit-lab[plots]"') from error
    return matplotlib.pyplot


def _ticker() -> Any:
    import matplotlib.ticker

    return matplotlib.ticker


def _grid(rows: int, columns: int, *, side: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure with rows of axes, closed in pyplot, so that it is shown once and freed with its last reference."""
    plt = _pyplot()
    size = (side * 1.25 * columns + 0.6, side * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    plt.close(figure)
    return figure, axes.tolist()


def _overlay(axis: Axes, image: NDArray[np.float64], one: NDArray[np.float64], top: float | None) -> None:
    """A map over a grey picture, with its scale of colours."""
    height, width = image.shape[:2]
    axis.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
    shown = axis.imshow(one, cmap="viridis", alpha=0.8, vmin=0, vmax=top, extent=(0, width, height, 0))
    bar = axis.figure.colorbar(shown, ax=axis, shrink=0.8, format="%.2g")
    bar.ax.tick_params(labelsize="x-small")


def _only(used: Sequence[Axes], axes: Sequence[Sequence[Axes]], unit: str) -> None:
    """Label the places of a picture once for each line and column of axes, and take unused axes away."""
    for line in axes:
        for axis in line:
            if axis not in used:
                axis.remove()
    for axis in used:
        axis.tick_params(labelsize="x-small")
        for one in (axis.xaxis, axis.yaxis):  # places are whole: no tick at 0.5
            one.set_major_locator(_ticker().MaxNLocator("auto", integer=True))
    for axis in {id(line[0]): line[0] for line in axes if line[0] in used}.values():
        axis.set_ylabel(f"row, {unit}", fontsize="small")
    lowest = {place: axis for line in axes for place, axis in enumerate(line) if axis in used}
    for axis in lowest.values():
        axis.set_xlabel(f"column, {unit}", fontsize="small")


def _styles(count: int) -> list[dict[str, Any]]:
    """Lines that differ in colour and mark, and beyond eight lines also in line style."""
    return [
        {
            "color": OKABE_ITO[i % 8],
            "marker": _MARKERS[i % 8],
            "linestyle": ("-", "--", ":", "-.")[i // 8 % 4],
            "markersize": 4,
        }
        for i in range(count)
    ]


def _ticks(axis: Axes, which: str, label: str, names: Sequence[object] | None, count: int) -> None:
    """Label the positions of an axis; where there are many, only every n-th."""
    if names is not None and len(names) != count:
        raise ValueError(f"{len(names)} names for {count} places of {label!r}")
    every = range(0, count, -(-count // 20))
    texts = [str(i if names is None else names[i]) for i in every]
    turned = 90 if which == "x" and sum(map(len, texts)) > 40 else 0
    getattr(axis, f"set_{which}ticks")(list(every), texts, rotation=turned)
    getattr(axis, f"set_{which}label")(label)


def _some(values: Any, what: str) -> Any:
    if not len(values):
        raise ValueError(f"there are no {what} to show")
    return values


def _array(values: object, dimensions: int, what: str) -> NDArray[np.float64]:
    """Any tensor or list as float numbers."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be numbers of one shape, got {type(values).__name__}") from error
    if array.ndim != dimensions:
        raise ValueError(f"{what} must have {dimensions} dimensions, got shape {list(array.shape)}")
    return array


def _picture(picture: object) -> NDArray[np.float64]:
    """[h, w, 3] in [0, 1]."""
    whole = not hasattr(picture, "detach") and np.asarray(picture).dtype == np.uint8
    whole = whole or str(getattr(picture, "dtype", "")) == "torch.uint8"
    array = _array(picture, 3, "the picture")
    if array.shape[-1] != 3:
        array = array.transpose(1, 2, 0)
    if array.shape[-1] != 3:
        raise ValueError(f"a picture is [h, w, 3] or [3, h, w], got {list(array.shape)}")
    return array / 255 if whole else array
