"""16-bit encoders compute in float32 where the rules say so, and no pass changes a model."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from types import FrameType
from typing import Any

import pytest
import torch

from encoders import COMFYUI, DIFFUSERS, REFERENCE, Conditioner, TextRules, Tokenizers

PROMPTS = ["a (cat:1.3) wow", "dog"]


@pytest.fixture
def conditioner(tiny_tokenizers: Path, tiny_encoders: dict) -> Callable[..., Conditioner]:
    """Build a Conditioner under some rules, by default from the tiny encoders in float16."""
    tokenizers, models = Tokenizers.from_folder(tiny_tokenizers), [model.half() for model in tiny_encoders.values()]

    def build(rules: TextRules, encoders: Any = None) -> Conditioner:
        return Conditioner(*(encoders or models), tokenizers, rules, context_dim=96)

    return build


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computing_in_float32_equals_a_float32_copy(tiny_encoders: dict, conditioner: Any, dtype: torch.dtype):
    models = [model.double().to(dtype) for model in tiny_encoders.values()]
    wide = [deepcopy(model).float() for model in models]
    for rules in (COMFYUI, REFERENCE):
        found, wanted = conditioner(rules, models)(PROMPTS), conditioner(rules, wide)(PROMPTS)
        assert found.context.dtype == found.pooled.dtype == torch.float32
        assert torch.equal(found.context, wanted.context)
        assert torch.equal(found.pooled, wanted.pooled)
        stored = conditioner(replace(rules, encoder_dtype="stored"), models)(PROMPTS)
        assert stored.context.dtype == stored.pooled.dtype == dtype
        assert not torch.equal(stored.context.float(), found.context)
    assert conditioner(DIFFUSERS, models)(PROMPTS).context.dtype == dtype


@pytest.mark.parametrize("name", ["clip_l", "t5"])
def test_wider_weights_stay_as_they_are(tiny_encoders: dict, name: str):
    ids, model = torch.tensor([[1, 2, 3]]), tiny_encoders[name]
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        found, wanted = model(ids, torch.float32), model(ids)
        parts = [(found, wanted)] if name == "t5" else zip(found, wanted, strict=True)
        assert all(one.dtype == dtype and torch.equal(one, other) for one, other in parts)


def test_gradients_reach_the_stored_weights(tiny_encoders: dict):
    model = tiny_encoders["clip_l"].bfloat16().requires_grad_(True)
    model(torch.tensor([[517, 3, 518]]), torch.float32).pooled.sum().backward()
    gradient = model.text_model.encoder.layers[0].mlp.fc1.weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    assert gradient.abs().sum() > 0


def test_two_threads_share_the_encoders(conditioner: Any):
    """One computes in float32 and one in float16, each as it does alone."""
    both = [conditioner(COMFYUI), conditioner(DIFFUSERS)]
    alone, found, barrier = [one(PROMPTS).context for one in both], ([], []), Barrier(2)

    def work(i: int) -> None:
        for _ in range(10):
            barrier.wait(60)
            found[i].append(both[i](PROMPTS).context)

    threads = [Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 10
        assert all(torch.equal(context, alone[i]) for context in found[i])


@contextmanager
def interrupted(at: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at line number `at` of those that run in the encoders package, and count the lines."""
    lines = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if Path(frame.f_code.co_filename).parent.name != "encoders":
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        yield lines
    finally:
        sys.settrace(before)


def test_an_interrupt_at_any_line_leaves_the_encoders_as_they_were(conditioner: Any):
    run = conditioner(COMFYUI)
    wanted = run(PROMPTS[1:])
    state = {
        id(module): dict(vars(module), _parameters=dict(module._parameters))
        for model in run.models.values()
        for module in model.modules()
    }
    with interrupted(0) as lines:
        run(PROMPTS[1:])
    assert lines[0] > 500
    for at in range(1, lines[0] + 1, lines[0] // 20):
        with pytest.raises(KeyboardInterrupt), interrupted(at):
            run(PROMPTS[1:])
    for model in run.models.values():
        for module in model.modules():
            assert vars(module) == state[id(module)]
            assert type(module._parameters) is dict
    assert torch.equal(run(PROMPTS[1:]).context, wanted.context)
