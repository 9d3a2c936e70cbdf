"""Two processes train as one with the batch of both: losses, gradients, weights, checkpoints; DDP and FSDP2."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from mmdit.training import distributed
from mmdit.training.checkpointing import checkpoints, load, save
from mmdit.training.config import ConfigError
from mmdit.training.distributed import processes_of
from mmdit.training.loop import Processes, training_step
from mmdit.training.run import train
from mmdit.training.setup import check_processes, start
from processes import in_processes, values
from tiny_training import samples, settings, tiny_model, tiny_pipe

CASES = {
    "full": {"method": "full", "ema": 0.9},
    "lora on fp8": {"method": "lora", "quant": "fp8", "checkpoint_blocks": False},
    "lora on one scale": {"method": "lora", "quant": "fp8-weight-only", "accumulation": 2},
}
STEPS = 2
RESUMED = "lora on one scale"
WRITTEN = {  # what whole runs train, by a name that begins with the strategy
    "ddp": {"method": "lora"},
    "fsdp": {"method": "full"},
    "fsdp on fp8": {"method": "lora", "quant": "fp8"},
}


def run_of(pipe, output, case, world, processes=None):
    pipe.transformer = tiny_model(torch.float64)
    changes = {"dtype": "float64", "steps": STEPS} | CASES[case]
    config = settings(output, batch_size=4 // world, **changes)
    return start(config, pipe=pipe, samples=samples(), processes=processes)


def facts(run, steps, saved=False):
    """Loss and norm of each step, and at the end all that is trained; a checkpoint after the first step on demand."""
    found = []
    for step in steps:
        result = training_step(run, step)
        found.append((float(run.processes.mean(result.loss)), float(result.norm)))
        if saved and step == 0:
            save(run)
    whole = {name: run.processes.whole(one.detach()).clone() for name, one in run.parameters.items()}
    average = [] if run.ema is None else [run.processes.whole(one).clone() for one in run.ema.average]
    return found, whole, average


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe(torch.float64)


@pytest.fixture(scope="module")
def of_one(pipe, tmp_path_factory):
    return {case: facts(run_of(pipe, tmp_path_factory.mktemp("one"), case, 1)[0], range(STEPS)) for case in CASES}


@pytest.fixture(scope="module")
def of_two(pipe, tmp_path_factory):
    """What two processes find in every case, by strategy and case; one pair of processes for all."""
    root = tmp_path_factory.mktemp("two")

    def work(rank):
        found = {}
        few = distributed.FEW_BYTES
        for strategy in ("ddp", "fsdp"):
            for case in CASES:
                distributed.FEW_BYTES = 0 if case == "full" else few
                processes = processes_of(strategy, torch.device("cpu"))
                output = root / f"{strategy} {case}"
                run, _ = run_of(pipe, output, case, 2, processes)
                found[strategy, case] = facts(run, range(STEPS), saved=case == RESUMED)
                found[strategy, case, "wrapped"] = isinstance(run.model, DistributedDataParallel)
                found[strategy, case, "held"] = sum(
                    one.to_local().numel() if hasattr(one, "to_local") else one.numel()
                    for one in run.model.parameters()
                )
                found[strategy, case, "dtypes"] = {one.dtype for one in run.model.parameters()}
            for name in (one for one in WRITTEN if one.startswith(strategy)):
                pipe.transformer = tiny_model(torch.float64)
                changes = {"dtype": "float64", "steps": STEPS, "block_norms": True} | WRITTEN[name]
                config = settings(root / f"{name} run", batch_size=2, log_every=1, **changes)
                processes = processes_of(strategy, torch.device("cpu"))
                train(config, quiet=True, pipe=pipe, samples=samples(), processes=processes)
            output = root / f"{strategy} {RESUMED}"
            again, _ = run_of(pipe, output, RESUMED, 2, processes_of(strategy, torch.device("cpu")))
            load(again, checkpoints(output)[-1])
            found[strategy, "resumed"] = facts(again, range(again.step, STEPS))
        return found | {"root": root}

    return values(in_processes(2, work, limit=120.0))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(of_one, of_two, strategy, case):
    steps, weights, average = of_one[case]
    for of_rank in of_two:
        theirs, their_weights, their_average = of_rank[strategy, case]
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(steps), atol=1e-10, rtol=1e-10)
        assert list(their_weights) == list(weights)
        for name, one in weights.items():
            torch.testing.assert_close(their_weights[name], one, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(their_average, average, atol=1e-8, rtol=1e-8)


def test_little_is_averaged_after_the_pass(of_two):
    for of_rank in of_two:
        assert [case for case in CASES if of_rank["ddp", case, "wrapped"]] == ["full"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_of_two_goes_on_from_its_checkpoint(of_two, strategy):
    for of_rank in of_two:
        steps, weights, _ = of_rank[strategy, RESUMED]
        theirs, their_weights, _ = of_rank[strategy, "resumed"]
        assert theirs == steps[1:]
        assert all(torch.equal(their_weights[name], one) for name, one in weights.items())


@pytest.mark.parametrize("name", WRITTEN)
def test_a_whole_run_of_two_writes_once_what_one_process_writes(pipe, of_two, name, tmp_path):
    pipe.transformer = tiny_model(torch.float64)
    changes = {"dtype": "float64", "steps": STEPS, "block_norms": True} | WRITTEN[name]
    path = train(settings(tmp_path, batch_size=4, log_every=1, **changes), quiet=True, pipe=pipe, samples=samples())
    theirs = of_two[0]["root"] / f"{name} run"
    wanted, found = (load_file(file) for file in (path, theirs / path.name))
    assert found.keys() == wanted.keys()
    for key, one in wanted.items():
        torch.testing.assert_close(found[key], one, atol=1e-7, rtol=1e-7)
    rows, their_rows = (
        [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
        for folder in (tmp_path, theirs)
    )
    assert len(their_rows) == len(rows) == STEPS
    for row, other in zip(rows, their_rows, strict=True):
        same = [key for key in row if key in ("step", "loss", "norm") or key.startswith("norm ")]
        assert len(same) > 4
        assert {key: other[key] for key in same} == pytest.approx({key: row[key] for key in same}, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "sharded", "word"),
    [
        ({"method": "full", "fused_backward": True, "clip": None}, False, "fused_backward"),
        ({"ahead": 4}, True, "ahead"),
        ({"sample_every": 2, "sample_prompts": ["a star"]}, True, "sample_every"),
    ],
)
def test_settings_that_several_processes_exclude(tmp_path, changes, sharded, word):
    with pytest.raises(ConfigError, match=word):
        check_processes(settings(tmp_path, **changes), Processes(world=2, sharded=sharded))


def test_fsdp_halves_what_each_process_holds(of_two):
    for case in CASES:
        held, whole = ([of_rank[way, case, "held"] for of_rank in of_two] for way in ("fsdp", "ddp"))
        assert all(one < 0.55 * other for one, other in zip(held, whole, strict=True)), case
        assert sum(held) <= 1.1 * whole[0]


def test_all_shards_are_of_floating_point(of_two):
    """FSDP2 of torch 2.11 asks each shard for a gradient before it freezes it, and integers refuse."""
    for of_rank in of_two:
        for case, changes in CASES.items():
            dtypes = of_rank["fsdp", case, "dtypes"]
            assert all(one.is_floating_point for one in dtypes), case
            assert (torch.float8_e4m3fn in dtypes) == ("quant" in changes)


def test_processes_that_start_apart_are_told(pipe, tmp_path):
    def work(rank):
        pipe.transformer = tiny_model(torch.float64)
        config = settings(tmp_path, seed=rank, dtype="float64")
        start(config, pipe=pipe, samples=samples(), processes=processes_of("ddp", torch.device("cpu")))

    for ended in in_processes(2, work):
        assert "RanksDifferError" in ended.error
        assert "rank 1" in ended.error


def test_fsdp_refuses_what_two_blocks_share():
    """`fully_shard` would make two parameters of it."""
    within, between, outside = (tiny_model() for _ in range(3))
    block = within.joint_blocks[0]
    block.context_block.mlp.fc1.weight = block.x_block.mlp.fc1.weight  # one group, so it stays one parameter
    between.joint_blocks[1].x_block.mlp.fc2.bias = between.joint_blocks[0].x_block.mlp.fc2.bias
    outside.x_embedder.proj.bias = outside.joint_blocks[1].x_block.attn.proj.bias
    check = distributed._check_ties
    check(within, dict(distributed._blocks(within)))
    for model, name in ((between, "joint_blocks.1.x_block.mlp.fc2.bias"), (outside, "x_embedder.proj.bias")):
        with pytest.raises(ValueError, match=name):
            check(model, dict(distributed._blocks(model)))
