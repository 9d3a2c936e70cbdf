"""Whole runs: they go on from a checkpoint bit for bit, also after kill -9, and write what others read."""

import gc
import json
import os
import random
import signal
import time
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file

from full import FULL
from mmdit import load_lora, load_mmdit, merge_lora
from mmdit.checkpoints.safetensors_io import CheckpointError, read_header
from mmdit.models.lora import all_beside
from mmdit.training.batches import InMemory
from mmdit.training.blocks import compile_blocks
from mmdit.training.checkpointing import checkpoints, load, save
from mmdit.training.config import TrainingConfig
from mmdit.training.ema import Ema
from mmdit.training.journal import Journal
from mmdit.training.loop import Processes, block_norms, clipped, flow_losses, training_step
from mmdit.training.run import loss_by_time, train
from mmdit.training.setup import chosen_of, make_optimizer, start
from tiny_training import noise, samples, settings, tiny_model, tiny_pipe

WAYS = {
    "lora": {},
    "dora, accumulated, average": {"adapter": "dora", "accumulation": 2, "ema": 0.9},
    "lokr": {"adapter": "lokr", "naming": "comfyui"},
    "float8 base, ahead": {"quant": "fp8", "ahead": 4},
    "full": {"method": "full", "learning_rate": 1e-3},
    "full, fused": {"method": "full", "learning_rate": 1e-3, "fused_backward": True, "clip": None},
    "some": {"method": "full", "trained": ["joint_blocks.1.*"]},
    "controlnet": {"method": "controlnet", "control_blocks": 1},
}


def rows(folder: Path) -> list[dict]:
    lines = (folder / "progress.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("ms", "seconds")} for line in lines]


OFTEN = ["dora, accumulated, average", "float8 base, ahead", "full, fused", "controlnet"]


@pytest.mark.parametrize("way", WAYS if FULL else OFTEN)
def test_a_run_goes_on_bit_for_bit(way: str, tmp_path: Path) -> None:
    whole, cut = (settings(tmp_path / name, steps=4, **WAYS[way]) for name in ("whole", "cut"))
    data = samples(hints=way == "controlnet")
    wanted = load_file(train(whole, quiet=True, pipe=tiny_pipe(), samples=data))
    run, _ = start(cut, pipe=tiny_pipe(), samples=data)
    journal = Journal(tmp_path / "cut", quiet=True)
    for step in range(2):
        training_step(run, step)
    save(run)
    journal.row("train", step=2, loss=9.0)  # a row of a step after the checkpoint
    found = load_file(train(cut, resume=True, quiet=True, pipe=tiny_pipe(), samples=data))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")[2:]
    losses = [row["loss"] for row in rows(tmp_path / "whole")]
    assert len(set(losses)) == 4


def test_checkpoint_ahead_and_compute_again_change_no_loss(tmp_path: Path) -> None:
    found = []
    for more in ({"checkpoint_blocks": False}, {"keep_attention": False}, {"ahead": 2}, {"ahead": 1}):
        run, _ = start(settings(tmp_path, **more), pipe=tiny_pipe(), samples=samples())
        found.append([float(training_step(run, step).loss) for step in range(3)])
    assert found[1] == found[0]
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    assert found[3] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
def test_compiled_blocks_take_any_number_of_shapes() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with torch._dynamo.config.patch(recompile_limit=2):  # which also puts back what `compile_blocks` sets
        compile_blocks([block := Block()], backend="eager")
        for rows in range(2, 6):
            assert torch.equal(block(torch.ones(rows)), torch.full((rows,), 2.0))


def test_between_steps_the_model_has_its_own_modulation(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    _, trained = start(settings(tmp_path, ahead=3), pipe=pipe, samples=samples())
    inputs = noise(1, 2, 16, 8, 8), torch.tensor([300.0, 20.0]), noise(2, 2, 6, 32), noise(3, 2, 16)
    trained.ahead.enter(1)
    of_the_pass = pipe.transformer(*inputs)
    with pytest.raises(KeyboardInterrupt), trained.ahead.restored():
        found = pipe.transformer(*inputs)
        raise KeyboardInterrupt
    assert torch.equal(found, tiny_model()(*inputs))
    assert torch.equal(pipe.transformer(*inputs), of_the_pass)
    assert not torch.allclose(found, of_the_pass, rtol=0.1)


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    """Every checkpoint that is there is whole, and the end is that of a run that nobody killed."""
    steps, kills = (80, 24) if FULL else (12, 8)
    whole, cut = (settings(tmp_path / name, steps=steps, save_every=1, ema=0.9) for name in ("whole", "cut"))
    wanted = load_file(train(whole, quiet=True, pipe=tiny_pipe(), samples=samples()))
    rng, seen = random.Random(0), set()
    for _ in range(kills):
        child, told = forked(lambda data: train(cut, resume=True, quiet=True, pipe=tiny_pipe(), samples=data))
        for _ in range(rng.randrange(1, 14 if FULL else 6)):  # samples that the process has read, two a step
            told.read(1)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told.close()
        for one in checkpoints(cut.output):
            seen.add(one.step)
            assert json.loads((one.folder / "state.json").read_text())["step"] == one.step
            assert [read_header(file).entries for file in one.folder.glob("*.safetensors")]
    found = load_file(train(cut, resume=True, quiet=True, pipe=tiny_pipe(), samples=samples()))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert len(seen) > 3


@dataclass(frozen=True)
class Telling(InMemory):
    """Samples that write a byte whenever one is read."""

    to: int = -1

    def read(self, index: int):
        os.write(self.to, b"r")
        return super().read(index)


def forked(run) -> tuple[int, BinaryIO]:
    """A process that runs a function on samples, and the pipe that tells of each sample that it reads."""
    mine, its = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads
        child = os.fork()
    if not child:
        try:
            run(Telling(samples().samples, samples().empty, its))
        finally:
            os._exit(0)
    os.close(its)
    return child, os.fdopen(mine, "rb", buffering=0)


def test_accumulated_gradients_are_the_mean_of_the_passes(tmp_path: Path) -> None:
    run, _ = start(settings(tmp_path, accumulation=3, clip=1e9), pipe=tiny_pipe(), samples=samples())
    parts = [flow_losses(run.model, run.batch(0, micro)).mean() for micro in range(3)]
    parameters = list(run.parameters.values())
    grads = torch.autograd.grad(torch.stack(parts).mean(), parameters)
    wanted = sum(float(one.square().sum()) for one in grads) ** 0.5
    result = training_step(run, 0)
    assert float(result.norm) == pytest.approx(wanted, rel=1e-5)
    assert float(result.loss) == pytest.approx(float(torch.stack(parts).mean().detach()), rel=1e-6)
    assert len(result.times) == 6


PAIRS = [(kind, naming) for kind in ("lora", "dora", "lokr") for naming in ("diffusers", "comfyui", "kohya")]
PAIRS.remove(("lokr", "diffusers"))  # the config refuses it


@pytest.mark.parametrize(("kind", "naming"), PAIRS if FULL else PAIRS[::2])
def test_written_adapters_mean_the_trained_weights(kind: str, naming: str, tmp_path: Path) -> None:
    targets = ["joint_blocks.*.attn.qkv", "joint_blocks.0.x_block.mlp.fc1"]
    config = settings(tmp_path, adapter=kind, naming=naming, alpha=3.0, targets=targets, steps=2)
    pipe = tiny_pipe()
    path = train(config, quiet=True, pipe=pipe, samples=samples())
    lora, plain = load_lora(path), tiny_model()
    assert not lora.unused
    merged = merge_lora(tiny_model(), lora)
    x = noise(1, 5, 64)
    adapted = all_beside(pipe.transformer)
    assert len(adapted) == 5
    for name, linear in adapted.items():
        wanted = linear(x)
        weight = merged.get_parameter(f"{name}.weight")
        bias = merged.get_parameter(f"{name}.bias")
        moved = (weight - plain.get_parameter(f"{name}.weight")).norm()
        assert moved > 1e-3
        torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), wanted, rtol=1e-4, atol=1e-5)
    metadata = read_header(path).metadata
    assert ("lora_adapter_metadata" in metadata) == (naming == "diffusers")
    assert (metadata.get("ss_network_dim") == "2") == (naming != "diffusers")


def test_a_trained_transformer_loads(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    path = train(settings(tmp_path, method="full", steps=2), quiet=True, pipe=pipe, samples=samples())
    read = load_mmdit(path)
    assert all(map(torch.equal, read.state_dict().values(), pipe.transformer.state_dict().values()))


def test_what_cannot_go_on_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, steps=2)
    train(config, quiet=True, pipe=tiny_pipe(), samples=samples())
    with pytest.raises(FileExistsError, match=r"step 2.*--resume"):
        train(config, pipe=tiny_pipe(), samples=samples())
    with pytest.raises(CheckpointError, match=r"rank 2 \(now 4\)"):
        train(settings(tmp_path, steps=4, rank=4), resume=True, quiet=True, pipe=tiny_pipe(), samples=samples())
    run, _ = start(config, pipe=tiny_pipe(), samples=samples())
    (one,) = checkpoints(tmp_path)
    run.processes = Processes(world=3)
    with pytest.raises(CheckpointError, match=r"1 processes.* 3"):
        load(run, one)
    run.processes, path = Processes(), one.folder / "state.json"
    whole = path.read_text()
    path.write_text(json.dumps({key: part for key, part in json.loads(whole).items() if key != "optimizer"}))
    with pytest.raises(CheckpointError, match=r"state\.json has no 'optimizer'"):
        load(run, one)
    path.write_text(whole)
    (one.folder / "parameters.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match=r"parameters\.safetensors"):
        load(run, one)


def test_a_loss_that_is_not_finite_names_step_time_and_layer(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    run, _ = start(settings(tmp_path, checkpoint_blocks=False), pipe=pipe, samples=samples())
    training_step(run, 0)
    before = [one.detach().clone() for one in run.parameters.values()]
    pipe.transformer.joint_blocks[1].x_block.mlp.fc1.weight.data[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"step 1: .*timestep \d+.*joint_blocks\.1\.x_block\.mlp\.fc1"):
        training_step(run, 1)
    assert all(map(torch.equal, before, run.parameters.values()))
    bad = samples()
    bad.samples[0].mean[0, 0, 0] = float("nan")
    run, _ = start(settings(tmp_path, batch_size=5), pipe=tiny_pipe(), samples=bad)
    with pytest.raises(FloatingPointError, match="x0"):
        [training_step(run, step) for step in range(2)]


@pytest.mark.parametrize("clip", [1.0, None])
def test_gradients_that_are_not_finite_change_no_weight(tmp_path: Path, clip: float | None) -> None:
    run, _ = start(settings(tmp_path, clip=clip), pipe=tiny_pipe(), samples=samples())
    before = [one.detach().clone() for one in run.parameters.values()]
    next(iter(run.parameters.values())).register_hook(lambda grad: torch.full_like(grad, float("inf")))
    with pytest.raises(FloatingPointError, match=r"step 0: .*gradients is inf"):
        training_step(run, 0)
    assert all(map(torch.equal, before, run.parameters.values()))


@pytest.mark.parametrize("clip", [0.01, None])
def test_the_norm_is_that_of_all_gradients_before_clipping(clip: float | None) -> None:
    torch.manual_seed(0)
    parts = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2,))]
    grads = [torch.randn(part.shape) for part in parts[:2]]
    for part, grad in zip(parts, grads, strict=False):
        part.grad = grad.clone()
    expected = torch.cat([grad.flatten() for grad in grads]).double().norm()
    assert clipped(parts, clip) == pytest.approx(float(expected), rel=1e-6)
    left = torch.cat([part.grad.flatten() for part in parts[:2]]).double().norm()
    assert float(left) == pytest.approx(clip or float(expected), rel=1e-3)
    assert clipped(parts[2:], clip) is None


def test_a_loss_under_fsdp_that_is_not_finite_runs_no_pass_that_the_others_lack(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    run, _ = start(settings(tmp_path, checkpoint_blocks=False), pipe=pipe, samples=samples())
    pipe.transformer.joint_blocks[1].x_block.mlp.fc1.weight.data[0, 0] = float("inf")
    run.processes, passes = Processes(sharded=True), []
    run.model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(FloatingPointError, match=r"step 0: .*timestep \d+.*fsdp"):
        training_step(run, 0)
    assert len(passes) == 1


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path) -> None:
    run, _ = start(settings(tmp_path, schedule="constant", steps=2), pipe=tiny_pipe(), samples=samples())
    run.step = 2
    save(run)
    run, _ = start(settings(tmp_path, schedule="constant", steps=1), pipe=tiny_pipe(), samples=samples())
    with pytest.raises(CheckpointError, match=r"done 2 steps.* 1:"):
        load(run, checkpoints(tmp_path)[-1])
    assert run.step == 0


def test_trained_without_globs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained"):
        start(settings(tmp_path, method="full", trained=[]), pipe=tiny_pipe(), samples=samples())


def test_the_log_tells_loss_by_time_and_norms_by_block(tmp_path: Path) -> None:
    times, losses = torch.tensor([0.05, 0.55, 0.58, 1.0]), torch.tensor([1.0, 2.0, 4.0, 7.0])
    assert loss_by_time(times, losses, 2) == {"t 0-0.5": 1.0, "t 0.5-1": pytest.approx(13 / 3)}
    train(settings(tmp_path, steps=1, block_norms=True, clip=1e9), quiet=True, pipe=tiny_pipe(), samples=samples())
    (row,) = rows(tmp_path)
    parts = [row[f"norm joint_blocks.{i}"] for i in range(2)]
    assert row["norm"] == pytest.approx(sum(part**2 for part in parts) ** 0.5)
    run, _ = start(settings(tmp_path), pipe=tiny_pipe(), samples=samples())
    flow_losses(run.model, run.batch(0)).mean().backward()
    wanted = sum(float(one.grad.square().sum()) for name, one in run.parameters.items() if ".1." in name[:15]) ** 0.5
    assert float(block_norms(run.parameters)["joint_blocks.1"]) == pytest.approx(wanted)


def test_a_fused_backward_leaves_nothing_behind() -> None:
    """Hooks on parameters that hold the optimizer would keep both for ever: the collector cannot see into them."""
    layer = torch.nn.Linear(3, 3)
    optimizer = make_optimizer(layer.parameters(), TrainingConfig(fused_backward=True, clip=None))
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 3)).sum().backward()
    assert layer.weight.grad is None
    assert not torch.equal(layer.weight, before)
    left = weakref.ref(layer.weight)
    del layer, optimizer
    gc.collect()
    assert left() is None


def test_a_shared_parameter_trains_under_each_of_its_names() -> None:
    model = tiny_model()
    first, second = (block.x_block.mlp.fc1 for block in model.joint_blocks)
    second.weight = first.weight
    trained = dict(chosen_of(model, ["joint_blocks.1.x_block.mlp.fc1.weight"]))
    assert list(trained) == ["joint_blocks.0.x_block.mlp.fc1.weight"]
    assert [one for one in model.parameters() if one.requires_grad] == [second.weight]
    assert len(Ema(model, 0.9).average) == len(list(model.parameters()))
