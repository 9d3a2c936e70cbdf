"""Settings of a run: JSON in and out, comments, and every wrong word."""

import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from mmdit.cli import main
from mmdit.training import run as run_module
from mmdit.training.batches import Batch
from mmdit.training.config import ConfigError, TrainingConfig, settings
from mmdit.training.loop import flow_losses
from mmdit.training.presets import config_for
from mmdit.training.rates import rate_at
from mmdit.training.run import train
from samplers.training import WEIGHTINGS
from tiny_training import samples, tiny_pipe, write_pictures
from tiny_training import settings as tiny_settings


def test_json_in_and_out() -> None:
    config = TrainingConfig(rank=3, targets=("a.*",), alpha=2.0, clip=None)
    assert TrainingConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.scale == 2 / 3


def test_every_setting_is_described_and_its_default_is_valid() -> None:
    assert all(len(said) > 10 for said in settings().values())
    assert list(settings()) == [one.name for one in fields(TrainingConfig)]
    text = TrainingConfig().commented()
    for name, said in settings().items():
        assert f'"// {name}": {json.dumps(said)}' in text
    assert TrainingConfig.from_json(json.loads(text)) == TrainingConfig()


@pytest.mark.parametrize(
    ("wrong", "facts"),
    [
        ({"rnak": 4}, "'rnak'.*rank"),
        ({"rank": 0}, "rank is 0, expected .* number of at least 1"),
        ({"rank": 2.5}, "rank.*2.5.*whole"),
        ({"rank": True}, "rank.*true"),
        ({"learning_rate": 0}, "learning_rate.*above 0"),
        ({"learning_rate": "1e-4"}, "learning_rate.*number"),
        ({"method": "lroa"}, "method.*'lroa'.*lora"),
        ({"betas": [0.9]}, "betas.*2"),
        ({"betas": [0.9, 1.5]}, "betas.*1.5"),
        ({"targets": "attn"}, "targets.*array"),
        ({"quant": "fp9"}, "quant.*'fp9'.*fp8"),
        ({"quant": "fp8", "method": "full"}, "quant.*full"),
        ({"quant": "fp8-static"}, "quant.*scales"),
        ({"adapter": "lokr"}, "lokr.*diffusers|diffusers.*lokr"),
        ({"multiple": 24}, "multiple.*16.*24"),
        ({"fused_backward": True}, "clip"),
        ({"sample_every": 5}, "sample_prompts"),
        ({"caption_dropout": 1.2}, "caption_dropout.*1.2"),
        ({"ahead": 4, "method": "full"}, "ahead.*full"),
    ],
)
def test_wrong_settings(wrong: dict, facts: str) -> None:
    with pytest.raises(ConfigError, match=facts):
        TrainingConfig.from_json(wrong)


def test_rates() -> None:
    at = {
        name: [rate_at(i, 10, peak=2.0, warmup=2, schedule=name) for i in range(10)] for name in ("constant", "linear")
    }
    assert at["constant"] == [1.0] + [2.0] * 9
    assert at["linear"] == [1.0, 2.0, *(2 * (1 - i / 8) for i in range(8))]
    cosine = [rate_at(i, 10, peak=2.0, warmup=2, schedule="cosine") for i in range(10)]
    assert cosine[2:] == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(8)])


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("none", lambda t: 1.0),
        ("sigma_sqrt", lambda t: 1 / t**2),
        ("cosmap", lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t * t))),
        (
            "logit_normal",
            lambda t: math.exp(-(math.log(t / (1 - t)) ** 2) / 2) / (math.sqrt(2 * math.pi) * t * (1 - t)),
        ),
    ],
)
def test_weightings_in_closed_form(name, weight) -> None:
    """A model that predicts a constant c, from latents of a and noise of b: the loss is weight (c - b + a)^2."""

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, latent, timestep, context, pooled):
            return self.value.expand(latent.shape)

    model, t = Constant(), torch.tensor([0.2, 0.9], dtype=torch.float64)
    full = [torch.full((2, 4, 2, 2), value, dtype=torch.float64) for value in (0.5, 2.0)]
    losses = flow_losses(model, Batch(*full, t, full[0], full[0]), WEIGHTINGS[name])
    wanted = [weight(float(one)) * (0.3 - 2.0 + 0.5) ** 2 for one in t]
    assert losses.tolist() == pytest.approx(wanted, rel=1e-12)
    losses.mean().backward()
    slope = sum(weight(float(one)) for one in t) / 2 * 2 * (0.3 - 2.0 + 0.5)
    assert float(model.value.grad) == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize(
    ("setting", "package"), [({"optimizer": "adamw8bit"}, "torchao"), ({"tensorboard": True}, "tensorboard")]
)
def test_a_missing_package_is_named(setting: dict, package: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"pip install.*{package}"):
        train(tiny_settings(tmp_path, **setting), quiet=True, pipe=tiny_pipe(), samples=samples())


def test_a_preset_knows_the_model(tmp_path: Path) -> None:
    demo = config_for("demo", method="lora", data="d", output="o")
    assert (demo.size, demo.dtype, demo.quant) == (128, "float32", None)
    large = config_for("stabilityai/stable-diffusion-3.5-large", method="lora", data="d", output="o")
    assert (large.size, large.quant) == (1024, "fp8")
    assert large.ahead > 0


def test_the_command_line_trains_and_goes_on(tmp_path: Path, capsys) -> None:
    (tmp_path / "data").mkdir()
    write_pictures(tmp_path / "data", 2)
    path = tmp_path / "run.json"
    assert main(["train", "init", str(path), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    assert main(["train", "init", str(path)]) == 1
    values = json.loads(path.read_text())
    small = {"steps": 2, "batch_size": 1, "rank": 1, "size": 32, "multiple": 16, "sample_every": 2, "sample_steps": 1}
    path.write_text(json.dumps(values | small | {"sample_prompts": ["a red circle"], "ema": 0.5, "device": "cpu"}))
    assert main(["train", "full", str(path)]) == 2
    assert main(["train", "lora", str(path), "-q"]) == 0
    out = tmp_path / "out"
    assert (out / "lora.safetensors").is_file()
    assert [one.name for one in (out / "samples").iterdir()] == ["step-00000002-0.png"]
    assert TrainingConfig.from_json(out / "config.json").steps == 2
    assert main(["train", "lora", str(path), "-q"]) == 1
    path.write_text(json.dumps(values | small | {"sample_prompts": ["a red circle"], "ema": 0.5, "steps": 3}))
    assert main(["train", "lora", str(path), "-q", "--resume"]) == 0
    steps = [json.loads(line)["step"] for line in (out / "progress.jsonl").read_text().splitlines()]
    assert steps[-1] == 2
    assert "--resume" in capsys.readouterr().err
    path.write_text(json.dumps(values | {"rnak": 1}))
    assert main(["train", "lora", str(path)]) == 2
    assert "rnak" in capsys.readouterr().err
