"""Plots show the numbers they are given, on labelled axes, and need matplotlib only when they are called."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmdit import plots
from refusals import refuses

PICTURE = torch.rand(3, 8, 12)


def saved(figure):
    """Figures can be written without a screen."""
    figure.savefig(target := io.BytesIO(), dpi=40)
    assert target.getvalue().startswith(b"\x89PNG")
    return figure


def images(figure):
    return [image.get_array().data for axis in figure.axes for image in axis.images]


def labels(figure):
    return {axis.get_xlabel() for axis in figure.axes} | {axis.get_ylabel() for axis in figure.axes}


def test_heat_maps_lie_over_the_picture():
    maps = {name: torch.rand(4, 6, dtype=torch.bfloat16) for name in ("red", "circle", "star")}
    figure = saved(plots.heat_maps(PICTURE, maps, columns=2, title="a prompt"))
    shown = images(figure)
    np.testing.assert_allclose(shown[0], PICTURE.permute(1, 2, 0), rtol=1e-6)
    np.testing.assert_allclose(shown[2], maps["red"].float())
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["picture", "red", "circle", "star"]
    assert {"row, pixels", "column, pixels"} <= labels(figure)
    overlay = figure.axes[1].images[1]
    assert overlay.get_extent() == [0, 12, 8, 0]
    assert overlay.get_cmap().name == "viridis"
    assert "share of a patch's attention" in figure.get_supxlabel()


def test_scales_of_heat_maps():
    maps = {"low": np.full((2, 2), 0.1), "high": np.full((2, 2), 0.4)}
    tops = [
        [axis.images[1].get_clim()[1] for axis in plots.heat_maps(PICTURE, maps, shared=shared).axes[1:3]]
        for shared in (False, True)
    ]
    assert tops == [[0.1, 0.4], [0.4, 0.4]]


@pytest.mark.parametrize("kind", ["uint8", "tensor", "pil"])
def test_pictures_of_any_kind(kind):
    from PIL import Image

    array = np.arange(96, dtype=np.uint8).reshape(4, 8, 3)
    picture = {"uint8": array, "tensor": torch.from_numpy(array).permute(2, 0, 1), "pil": Image.fromarray(array)}[kind]
    shown = images(plots.heat_maps(picture, {"a": np.ones((2, 2))}))[0]
    np.testing.assert_allclose(shown, array / 255)


def test_layers_by_steps():
    values = torch.arange(6.0).reshape(2, 3)
    figure = saved(plots.layer_step_grid(values, label="signal to noise, dB", steps=[5, 9], layers=["a", "b", "c"]))
    np.testing.assert_array_equal(images(figure)[0], values.T)
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["5", "9"]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b", "c"]
    assert {"step", "block", "signal to noise, dB"} <= labels(figure)
    assert axis.images[0].get_cmap().name == "cividis"
    many = plots.layer_step_grid(np.zeros((50, 38)), label="x")
    assert len(many.axes[0].get_xticks()) == 17
    named = plots.layer_step_grid(np.zeros((20, 2)), label="x", steps=[f"{i / 20:.2f}" for i in range(20)])
    rotations = [{text.get_rotation() for text in one.axes[0].get_xticklabels()} for one in (many, named)]
    assert rotations == [{0.0}, {90.0}]  # so that labels do not run into each other


def test_heads():
    values = torch.rand(5, 3, 4)
    figure = saved(plots.head_grid(values, columns=3))
    np.testing.assert_allclose(images(figure), values)
    assert len({axis.images[0].get_clim() for axis in figure.axes if axis.images}) == 1
    assert {"row, patches", "column, patches", "share of a patch's attention"} <= labels(figure)


def test_spectra():
    matrix = torch.diag(torch.tensor([1.0, 4.0, 2.0]))
    figure = saved(plots.spectra({"a": torch.linalg.svdvals(matrix), "b": [3.0, 1.0]}))
    (a, b), axis = figure.axes[0].lines, figure.axes[0]
    np.testing.assert_allclose(a.get_ydata(), [1, 0.5, 0.25])
    np.testing.assert_allclose(b.get_xdata(), [1, 2])
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert "singular value / the largest" in labels(figure)
    assert a.get_color() != b.get_color()


def test_error_by_layer():
    values, interval = {"fp8": [1.0, 2.0, 4.0], "bf16": torch.ones(3)}, {"fp8": [[0.5, 1.0, 2.0], [2.0, 3.0, 6.0]]}
    figure = saved(plots.error_by_layer(values, label="error / bfloat16's", intervals=interval, log=True, layers="abc"))
    axis = figure.axes[0]
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [1, 2, 4])
    assert len(axis.collections) == 1
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["fp8", "bf16"]
    assert {"block", "error / bfloat16's"} <= labels(figure)


def test_more_lines_than_colours_differ_in_stroke():
    figure = plots.error_by_layer({str(i): [1.0] for i in range(12)}, label="x")
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == 12


def test_wrong_shapes():
    refuses(lambda: plots.heat_maps(PICTURE, {}), "no maps", error=ValueError)
    refuses(lambda: plots.heat_maps(PICTURE, {"red": [1.0]}), "'red'", "2 dimensions", "[1]", error=ValueError)
    refuses(lambda: plots.heat_maps(torch.rand(4, 8, 8), {"a": [[1.0]]}), "[h, w, 3]", error=ValueError)
    refuses(lambda: plots.layer_step_grid([[1.0]], label="x", steps=[1, 2]), "2 names for 1", error=ValueError)
    refuses(lambda: plots.head_grid(np.ones((2, 2, 2)), titles=["a"]), "1 titles for 2", error=ValueError)
    refuses(lambda: plots.spectra({}), "no spectra", error=ValueError)
    refuses(lambda: plots.error_by_layer({"a": [1.0], "b": [1.0, 2.0]}, label="x"), "[1, 2]", error=ValueError)


def test_figures_are_not_kept():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()  # other tests may have left some
    plots.spectra({"a": [1.0]})
    assert plt.get_fignums() == before


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    refuses(lambda: plots.spectra({"a": [1.0]}), 'pip install "mmdit-lab[plots]"', error=ImportError)


def test_importing_needs_no_matplotlib():
    code = "import sys; from mmdit import plots; assert not any('matplotlib' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
