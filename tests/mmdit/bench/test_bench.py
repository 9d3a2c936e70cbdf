"""The bench counts what a step must do and measures every row it names; times themselves are not tested."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from encoders.vae import VAEConfig
from full import in_full
from half_units import pretend_half
from mmdit import ControlNet, MMDiT, Pipeline
from mmdit.bench import controlnet, lora, memory, picture, step, training
from mmdit.bench.floor import floor_of
from mmdit.bench.layers import shapes_of
from mmdit.bench.random_models import MODELS, Inputs, recipe_of
from mmdit.bench.rows import attempted, said_of
from mmdit.bench.step import Work, bench, table
from mmdit.bench.ways import table as ways_table
from mmdit.bench.ways import ways
from mmdit.cli.app import main
from mmdit.models.config import MMDiTConfig
from mmdit.utils import weight_bytes
from quant import quantize_
from quant.quantize import linears_of
from quant.recipe import RECIPES


@pytest.mark.parametrize("name", in_full([*MODELS], [name for name in MODELS if name != "large"]))
def test_work_is_what_torch_counts(name):
    """All matrix products and attention of a step; torch counts the patch convolution too, which is left out."""
    config, size, text = MODELS[name], 128, 154
    with torch.device("meta"):
        model = MMDiT(config)
    inputs = Inputs(
        *(torch.empty(shape, device="meta") for shape in ((2, 16, 16, 16), (2,), (2, text, config.context_dim))),
        torch.empty(2, config.pooled_dim, device="meta"),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs.latent, inputs.timestep, inputs.context, inputs.pooled)
    patches = 2 * 2 * 64 * 64 * config.hidden_size
    work = Work.of(model, size, text, 2)
    assert work.linear_flops + work.other_flops == pytest.approx(counter.get_total_flops() - patches, rel=1e-3)
    assert work.tokens == 64 + text


def test_large_is_as_large_as_it_is():
    with torch.device("meta"):
        work = Work.of(MMDiT(MODELS["large"]), 1024, 333, 2)
    assert work.weight_bytes / 1e9 == pytest.approx(16.1, abs=0.1)
    assert work.linear_flops / 1e12 == pytest.approx(47.7, abs=0.1)


def test_every_row_is_measured(tmp_path, capsys):
    out = tmp_path / "bench.json"
    few = ["--model", "demo", "--size", "64", "--text", "20", "--repeats", "2", "--device", "cpu", "--dtype", "float32"]
    assert main(["bench", *few, "--eager", "--quant", "fp8", "--against", "diffusers", "--output", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["mmdit float32 eager", "mmdit fp8 eager", "diffusers float32 eager"]
    assert all(row["milliseconds"] > 0 for row in rows)
    assert rows[1]["weights_gb"] < rows[0]["weights_gb"]
    assert rows[0]["weights_gb"] == pytest.approx(rows[2]["weights_gb"], rel=0.02)
    assert "TFLOP a step" in capsys.readouterr().out


def test_fast_rows_and_floors(monkeypatch):
    few = {"model": "demo", "size": 64, "text": 20, "repeats": 1, "device": "cpu", "dtype": torch.float32}
    asked = []
    monkeypatch.setattr(step, "floor_of", lambda model, recipe, **sizes: asked.append(recipe) or 1.0 + len(asked))
    found = list(bench(**few, fast=True, compiled=False, recipes=["fp8+exact"], only=["*fast", "*fp8*"]))
    rows = {row.name: row.floor for row in found}
    assert rows == {"mmdit float32 fast": 2.0, "mmdit fp8+exact fast": 3.0, "mmdit fp8+exact eager": 3.0}
    assert asked == [None, "fp8"]
    assert "mmdit float32 fast" not in {row.name for row in bench(**few, compiled=False, recipes=[])}


def test_a_cpu_has_no_floor():
    assert floor_of("demo", None, device="cpu") == 0


def test_rows_by_name():
    few = {"model": "demo", "size": 64, "text": 20, "repeats": 1, "device": "cpu", "dtype": torch.float32}
    found = bench(**few, compiled=False, recipes=["fp8"], against=["diffusers"], only=["*fp8*", "diffusers*"])
    assert [row.name for row in found] == ["mmdit fp8 eager", "diffusers float32 eager"]
    with pytest.raises(ValueError, match="'fp8' matches no row; there are mmdit float32 eager, "):
        next(bench(**few, only=["fp8"]))


def test_a_peer_without_a_row_is_refused():
    with pytest.raises(ValueError, match="torchao-tuned has compiled blocks only"):
        next(bench("demo", against=["torchao-tuned"], compiled=False, device="cpu"))


def test_a_row_keeps_its_compiler_settings_to_itself(monkeypatch):
    from torch._inductor import config

    def build(*_, **__):
        seen.append(config.coordinate_descent_tuning)
        config.coordinate_descent_tuning = True  # as torchao's quantize_ does
        return torch.nn.Linear(2, 2), lambda inputs: None

    seen = []
    monkeypatch.setattr("mmdit.bench.step.ours", build)
    few = {"model": "demo", "size": 64, "text": 20, "repeats": 1, "device": "cpu", "recipes": ["fp8"]}
    list(bench(**few, compiled=False))
    assert seen == [False, False]
    assert not config.coordinate_descent_tuning


def test_bytes_are_those_stored():
    linear = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    assert weight_bytes(linear) == 2 * 64 * 64 + 2 * 64
    quantize_(linear, "fp8")
    assert weight_bytes(linear) == 64 * 64 + 4 * 64 + 2 * 64


def test_unknown_names():
    for arguments in ({"model": "huge"}, {"recipes": ["fp9"]}, {"against": ["peer"]}):
        with pytest.raises(ValueError, match="is unknown; known are"):
            next(bench(**arguments, device="cpu"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["layers", "--model", "huge"],
        ["layers", "--quant", "fp8-static"],
        ["picture", "--quant", "fp9"],
        ["picture", "--against", "torchao"],
    ],
)
def test_unknown_names_on_the_command_line(arguments, capsys):
    assert main(["bench", *arguments, "--device", "cpu"]) == 2
    assert f"'{arguments[-1]}' is unknown; known are " in capsys.readouterr().err


def test_layers_and_pictures(capsys, monkeypatch):
    monkeypatch.setattr(picture, "_FEW_STEPS", 1)
    monkeypatch.setattr(picture, "VAEConfig", lambda: VAEConfig((32,) * 4, blocks_per_level=1))  # of diffusers' row
    few = ["--model", "demo", "--size", "64", "--device", "cpu", "--dtype", "float32"]
    assert main(["bench", "layers", "--text", "20", "--quant", "fp8", *few]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 8  # four Linears of either stream
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert all(row[3:5] == ["fp8", "emulated"] and row[9:] == ["inf", "inf"] for row in cells)
    assert all(float(row[i]) > 0 for row in cells for i in (5, 6, 7)), "times are measured on a CPU too"
    assert main(["bench", "picture", "--eager", "--steps", "1", "--against", "diffusers", *few]) == 0
    rows = capsys.readouterr().out.splitlines()
    names = [row.split("|")[1].strip() for row in rows[2:]]
    assert names == ["mmdit float32 eager", "mmdit fp8 eager", "diffusers float32 eager, no text encoders"]
    assert not [row for row in rows if "failed" in row]


def test_errors_without_a_message_are_rows_too(monkeypatch):
    def fails():
        raise AssertionError

    monkeypatch.setattr(training, "_rows", lambda *_: {"a": fails})
    (row,) = training.bench(device="cpu")
    assert row.note.startswith("AssertionError")
    assert said_of(ValueError("first\nsecond"), 3) == "ValueError: fir"


FEW = ["--model", "demo", "--size", "32", "--text", "5", "--repeats", "1", "--device", "cpu", "--dtype", "float32"]


def test_sides_are_measured_in_turns():
    seen, sides = [], {"without": iter([1.0, 9.0, 2.0]), "with": iter([5.0, 6.0, 4.0])}

    def measured(name):
        seen.append(name)
        return [next(sides[name]), 7.0]

    found = lora.in_turns(partial(measured, "without"), partial(measured, "with"), turns=3)
    assert found == [[2.0, 7.0], [5.0, 7.0]]
    assert seen == ["without", "with"] * 3


def test_loras_and_a_controlnet_are_measured(capsys, monkeypatch):
    tiny = MMDiTConfig(2, 64, 48, 24, 8, head_dim=16, sample_size=4)
    monkeypatch.setitem(MODELS, "demo", tiny)
    assert main(["bench", "lora", *FEW, "--quant", "fp8", "--ranks", "2", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[1]: cells for line in lines if len(cells := [cell.strip() for cell in line.split("|")]) > 2}
    for name in ("float32 fast", "float32 eager", "fp8 fast", "fp8 eager"):
        assert rows[name][7] == "no graph"
        assert float(rows[name][2]) > 0
    assert rows["rank 3 into fp8"][6] == rows["rank 3 into float32"][6] == "bit for bit"
    assert main(["bench", "controlnet", *FEW, "--quant"]) == 0
    said = capsys.readouterr().out
    assert "1 blocks of width 64" in said
    assert "| float32 eager" in said
    assert "failed" not in said


def test_operations_of_a_controlnet_are_what_torch_counts():
    config, size = controlnet.net_config(MODELS["demo"]), 128
    with torch.device("meta"):
        net = ControlNet(config)
    latent, tokens = torch.empty(2, 16, 16, 16, device="meta"), torch.empty(2, 64, config.hidden_size, device="meta")
    context, pooled = torch.empty(2, 5, 256, device="meta"), torch.empty(2, config.pooled_dim, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(latent, torch.empty(2, device="meta"), context, pooled, latent, tokens)
    patches = 2 * 2 * 64 * 64 * config.hidden_size
    once = 2 * 2 * sum(linear.weight.numel() for name, linear in linears_of(net) if "adaLN" in name or "text" in name)
    wanted = counter.get_total_flops() - patches - once
    assert controlnet.flops_of_net(config, size, 2) == pytest.approx(wanted, rel=1e-6)


def test_rows_go_on_after_one_that_fails():
    def fails():
        raise RuntimeError("no memory\nat all")

    found = list(attempted({"one": lambda: [1, 2], "two": fails, "three": lambda: [3, 4]}, 3))
    assert found == [["one", 1, 2], ["two", "failed: RuntimeError: no memory", "-"], ["three", 3, 4]]
    (late,) = attempted({"late": fails}, 3, seconds=-1.0)
    assert late[0] == "late"
    assert "not started" in late[1]


@pytest.fixture(scope="module")
def demo():
    return Pipeline.demo()


@pytest.mark.parametrize("error", [MemoryError(), FloatingPointError("nan"), AttributeError("gone"), OSError()])
def test_every_bench_goes_on_after_any_failure(demo, error, monkeypatch):
    """Where a pipeline runs out of memory, it raises MemoryError; errors may have no message."""

    def fails(*_, **__):
        raise error

    (row,) = attempted({"one": fails}, 2)
    monkeypatch.setattr(picture, "_drawn", fails)
    drawn = list(picture.pictures("demo", (), compiled=False, device="cpu", dtype=torch.float32))
    monkeypatch.setattr(memory, "_bytes_of", fails)
    budget, _ = memory._row(demo, "demo", "16", "8GB", memory.Picture(1, 1, 64), False)
    for said in (row[1], drawn[0].failed, budget.failed):
        assert type(error).__name__ in said


def test_ways_to_multiply_and_why_one_cannot(monkeypatch):
    pretend_half(monkeypatch, triton=False)
    shapes = shapes_of("demo", 16, 4)[:2]
    found = list(ways(shapes, device="cpu"))
    assert [(row.kind, row.way, row.rule) for row in found[:3]] == [
        ("plain", "16 bits", False),
        ("emulated", "library", True),
        ("weight-only", "library", True),
    ]
    assert all(row.milliseconds > 0 and row.error < (3e-7 if row.kind == "emulated" else 3e-3) for row in found)
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: failing())
    broken = [row for row in ways(shapes, device="cpu") if row.failed]
    assert [(row.kind, row.failed) for row in broken] == [("emulated", "no units")] * 2
    lines = ways_table(broken + found).splitlines()
    assert any("failed: no units" in line for line in lines)
    assert any(line.startswith("emulated: ") for line in lines)


def failing():
    raise RuntimeError("no units")


def test_a_row_that_fails_is_said_to(monkeypatch):
    monkeypatch.setattr("mmdit.bench.step.timed", lambda *args: failing())
    (row,) = bench("demo", size=64, text=20, recipes=["fp8:emulated"], only=["*emulated eager"], device="cpu")
    assert (row.name, row.failed, row.milliseconds) == ("mmdit fp8:emulated eager", "RuntimeError: no units", 0.0)
    assert "failed: RuntimeError: no units" in table(Work(1e12, 0.0, 1e9, 36), [row])


def test_a_bench_names_recipes():
    assert recipe_of("fp8:emulated") == replace(RECIPES["fp8"], backend="emulated")
    assert recipe_of("fp8:emulated+exact") == replace(RECIPES["fp8"], backend="emulated", fast_accum=False)
    assert recipe_of("fp8-weight-only") == RECIPES["fp8-weight-only"]
    with pytest.raises(ValueError, match="fp9"):
        recipe_of("fp9:emulated")


def test_loading_is_measured_and_results_are_as_large_as_files(monkeypatch, tmp_path, capsys):
    tiny = MMDiTConfig(2, 64, 48, 24, 8, head_dim=16, sample_size=4)
    monkeypatch.setitem(MODELS, "demo", tiny)
    monkeypatch.setattr("mmdit.bench.loading._warmed", lambda device, dtype: 0.0)
    options = ["--readers", "1", "3", "--device", "cpu", "--folder", str(tmp_path)]
    assert main(["bench", "loading", "--model", "demo", *options]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0].split(": ")[1].split()[0] for row in rows] == [
        *("written", "read", "read", "header,", "the", "tensors", "tensors", "tensors", "loaded", "loaded,", "tensors"),
        *("flushed", "from", "from", "from", "from"),
        *("written", "read", "read", "loaded"),
    ]
    assert not [row for row in rows if "failed" in row[1]]
    assert main(["bench", "loading", "--model", "demo", *options, "--cold"]) == 0
    ways = capsys.readouterr().out.splitlines()
    assert len([line for line in ways if "pass 1" in line]) == len([line for line in ways if "pass 2" in line]) > 0
    assert not [line for line in ways if "failed" in line]
    assert not list(tmp_path.iterdir())
