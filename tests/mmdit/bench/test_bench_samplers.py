"""`mmdit bench samplers` measures what it says, and writes all of it; the numbers themselves are for its user."""

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import samplers
from full import FULL
from mmdit import PROFILES, Pipeline
from mmdit.bench import sampler_plots
from mmdit.bench import samplers as bench_samplers
from mmdit.bench.samplers import MEASURES, Plan, errors, measure
from mmdit.cli.app import main


@pytest.fixture(scope="module")
def pipe():
    """With fewer T5 tokens than the 256 of the profile."""
    profile = PROFILES["diffusers"]
    return Pipeline.demo(profile=replace(profile, text=replace(profile.text, t5_length=77 if FULL else 32)))


def test_errors_fall_with_steps_and_calls_are_counted(pipe):
    plan = Plan(samplers=("euler", "heun", "dpmpp_2m_sde", "lcm", "euler_cfg_pp"), steps=(2, 4), prompts=1, fine=8)
    found = {(point.sampler, point.steps): point for point in errors(pipe, plan)}
    assert {name for name, _ in found} == {"euler", "heun", "dpmpp_2m_sde"}
    assert [found[name, 4].calls for name in ("euler", "heun", "dpmpp_2m_sde")] == [4, 7, 4]
    assert found["euler", 4].error < found["euler", 2].error


def test_the_exact_run_has_no_error(pipe):
    plan = Plan(samplers=("heun",), steps=(2,), prompts=1, fine=2)
    assert [point.error for point in errors(pipe, plan)] == [0]


def test_everything_is_written(pipe, tmp_path, monkeypatch, capsys, small_pictures):
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(bench_samplers, "orders_markdown", lambda: "| orders |")
    monkeypatch.setattr(bench_samplers, "Setting", partial(bench_samplers.Setting, t5="77"))
    monkeypatch.chdir(tmp_path)
    words = ["--samplers", "euler", "euler_ancestral", "--schedules", "normal", "beta", "--steps", "1", "2"]
    small = ["--prompts", "1", "--fine", "2", "--device", "cpu", "-o", "found"]
    assert main(["bench", "samplers", "--measure", *MEASURES, *words, *small]) == 0
    said = capsys.readouterr().out.splitlines()
    written = {path.name for path in (tmp_path / "found").iterdir()}
    assert {line.removeprefix("wrote found/") for line in said if line.startswith("wrote ")} == written
    kinds = {"page": "png", "orders": "md", "graphs": "md"}
    assert written == {f"{name}.{kind}" for name in MEASURES for kind in kinds.get(name, "json md png").split()}
    accuracy = json.loads((tmp_path / "found" / "accuracy.json").read_text())
    cells = [(one["row"], one["column"]) for one in accuracy["rows"]]
    assert cells == [(a, b) for a in ("euler", "euler_ancestral") for b in ("normal", "beta")]
    assert all(0 <= one["macro"] <= 1 for one in accuracy["rows"])
    assert accuracy["about"]["schedules"] == ["normal", "beta"]
    steps = json.loads((tmp_path / "found" / "steps.json").read_text())
    assert [one["column"] for one in steps["rows"]] == ["1", "2"] * 2
    for name in written:
        if name.endswith(".png"):
            Image.open(tmp_path / "found" / name).verify()
    assert "| euler " in (tmp_path / "found" / "steps.md").read_text()


def test_time_that_is_over_starts_nothing_more(pipe, tmp_path):
    plan = Plan(samplers=("euler", "heun"), schedules=("normal",), steps=(1,), prompts=1, minutes=1e-6)
    measure("accuracy", lambda: pipe, plan, tmp_path)
    assert len(json.loads((tmp_path / "accuracy.json").read_text())["rows"]) <= 1


def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    for words, said in {
        ("--measure", "eror"): "unknown measure 'eror'; did you mean 'error'",
        ("--samplers", "eular"): "unknown sampler 'eular'; did you mean 'euler'",
        ("--schedules", "norma"): "unknown schedule 'norma'; did you mean 'normal'",
        ("--steps", "0"): "--steps must be a whole number of at least 1, got 0",
        ("--prompts", "0"): "--prompts must be a whole number of at least 1, got 0",
    }.items():
        assert main(["bench", "samplers", *words]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "samplers", "--measure", "accuracy"]) == 1
    assert 'plots need matplotlib, which is not installed: pip install "mmdit-lab[plots]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ode_of_the_bench_is_that_of_the_pipeline(pipe):
    """The end of euler in `errors` is what `Pipeline.sample` ends at."""
    plan = Plan(samplers=("euler",), steps=(2,), prompts=1)
    denoise, noise = bench_samplers._ode(pipe, plan)
    text = bench_samplers.make_prompts(1, bench_samplers.SEED, held_out=True)
    with torch.no_grad():
        *_, ours = samplers.euler(denoise, noise, samplers.sigmas("normal", 2))
        both = pipe.encode(text), pipe.encode("")
        *_, theirs = pipe.sample(*both, noise, num_inference_steps=2, guidance_scale=4.5)
    torch.testing.assert_close(ours.x, theirs.x, rtol=0, atol=1e-5)


def test_labels_and_pictures_of_the_page_keep_their_distance(tmp_path):
    rows, columns = ("euler", "a_sampler_with_quite_a_long_name", "ddpm"), ("normal", "beta")
    pictures = {(row, column): Image.new("RGB", (64, 64), "black") for row in rows for column in columns}
    file = sampler_plots.page(pictures, "title", tmp_path / "page.png", ["ddpm"])
    sheet = np.asarray(Image.open(file).convert("L")).astype(int)
    side, gap = sampler_plots.SIDE, sampler_plots.GAP
    starts = [
        x for x in range(1, sheet.shape[1]) if (sheet[50:120, x] < 5).all(0) and not (sheet[50:120, x - 1] < 5).all(0)
    ]
    assert len(starts) == 2 * len(rows)
    for first, second in zip(starts[::2], starts[1::2], strict=True):
        assert second - first == side + gap
        assert (sheet[50:120, first - gap : first] == 255).all(), "a label touches a picture"
        assert (sheet[50:120, first + side : second] == 255).all(), "pictures touch"


def test_lines_of_a_panel_are_told_without_their_colour(monkeypatch, tmp_path):
    """Each family has a panel; its lines differ in marker and dash, and equal ones are one."""
    kept = []
    monkeypatch.setattr(sampler_plots, "_saved", lambda plots, figure, path: kept.append(figure) or path)
    lines = {f"s{i}": [(4, 1.0 / (i + 1)), (8, 0.5 / (i + 1))] for i in range(9)} | {"twin": [(8, 0.5), (4, 1.0)]}
    families = {name: "many" if name != "s8" else "one" for name in lines}
    sampler_plots.curves(lines, families, tmp_path / "x.png")
    many, one, *others = kept[0].axes
    assert [axis.get_title() for axis in (many, one)] == ["many", "one"]
    assert not any(axis.axison for axis in others)
    shown = [line for line in many.get_lines() if line.get_label()[0] != "_"]
    assert [line.get_label() for line in shown] == ["s0 =\ntwin", *(f"s{i}" for i in range(1, 8))]
    assert len({(line.get_marker(), line.get_linestyle()) for line in shown}) == len(shown)
    assert len({line.get_color() for line in shown}) == len(shown)
