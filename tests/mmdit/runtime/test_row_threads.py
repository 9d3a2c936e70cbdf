"""Rows of a batch in threads of their own: the results of one thread, who computes what, and what is left behind."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from threading import get_ident

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

import mmdit
from mmdit.models.attention import SelfOnly, attending
from mmdit.models.blocks import StreamBlock
from mmdit.models.config import MMDiTConfig
from mmdit.models.layers import Mlp
from mmdit.models.mmdit import MMDiT
from mmdit.runtime import row_threads
from quant.quantize import quantize_

CONFIG = MMDiTConfig(3, 128, 96, 48, 16, qk_norm="rms", dual_attention_blocks=(1,))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = MMDiT(CONFIG).requires_grad_(False)
    for one in model.parameters():
        one.normal_(std=0.1)
    return model


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def ran(monkeypatch):
    """Rows and thread of each call of an MLP."""
    found, forward = [], Mlp.forward

    def recorded(self, x):
        found.append((len(x), get_ident()))
        return forward(self, x)

    monkeypatch.setattr(Mlp, "forward", recorded)
    return found


def inputs(rows):
    torch.manual_seed(2)
    latent, context = torch.randn(rows, 16, 16, 12), torch.randn(rows, 40, 96)
    return latent, torch.full((rows,), 700.0), context, torch.randn(rows, 48)


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("changes", [{}, {"skip_layers": (1,)}, {"control": True}])
def test_rows_give_what_the_forward_gives(model, two_threads, ran, rows, changes):
    given = inputs(rows)
    if "control" in changes:
        changes = {"control": [torch.randn(rows, 48, 128), None, torch.randn(rows, 48, 128)]}
    found = row_threads.velocity(model, *given, **changes)
    of_threads = {thread: {rows for rows, of in ran if of == thread} for _, thread in ran}
    assert of_threads.pop(get_ident()) == {rows - rows // 2}
    assert [*of_threads.values()] == [{rows // 2}]
    torch.set_num_threads(1)
    wanted = model(*given, **changes)
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_only_small_models_with_a_row_for_each_thread_suit(model, two_threads, monkeypatch):
    latent = inputs(2)[0]
    assert row_threads.suits(model, latent)
    assert not row_threads.suits(model, latent[:1])
    assert not row_threads.suits(model, latent.to("meta"))
    assert not row_threads.suits(MMDiT(CONFIG).double(), latent)
    assert not row_threads.suits(torch.nn.Sequential(model), latent)
    quantized = MMDiT(CONFIG)
    quantize_(quantized, "fp8", select=["joint_blocks.2.x_block.mlp.fc2"])
    assert not row_threads.suits(quantized, latent)
    monkeypatch.setattr(row_threads, "_WIDEST", 127)
    assert not row_threads.suits(model, latent)
    monkeypatch.undo()
    for count in (1, 3):
        torch.set_num_threads(count)
        assert not row_threads.suits(model, latent)


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def hooked(module):
    handle = module.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


WATCHED = {
    "mode": lambda model: Mode(),
    "profiler": lambda model: torch.autograd.profiler.profile(use_kineto=False),
    "autocast": lambda model: torch.autocast("cpu", torch.float16, enabled=True),
    "hook": lambda model: hooked(model.joint_blocks[0].attend),
    "global hook": lambda model: register_module_forward_hook(lambda *_: None),
    "strategy": lambda model: attending([(model.joint_blocks[1].attend2, SelfOnly(0))]),
}


@pytest.mark.parametrize("watcher", WATCHED)
def test_one_thread_computes_all_rows_where_it_is_watched(model, two_threads, ran, watcher):
    if watcher == "autocast":
        model = MMDiT(replace(CONFIG, qk_norm=None)).requires_grad_(False)  # torch warns of mixed norms
    handle = WATCHED[watcher](model)
    with handle if hasattr(handle, "__enter__") else nullcontext():
        row_threads.velocity(model, *inputs(2))
    assert {*ran} == {(2, get_ident())}
    assert torch.get_num_threads() == 2


def test_one_thread_computes_all_rows_where_gradients_are_needed(two_threads, ran):
    row_threads.velocity(MMDiT(CONFIG), *inputs(2)).sum().backward()
    latent, *others = inputs(2)
    row_threads.velocity(MMDiT(CONFIG).requires_grad_(False), latent.requires_grad_(), *others).sum().backward()
    assert {*ran} == {(2, get_ident())}
    assert latent.grad is not None


def test_an_error_leaves_the_number_of_threads_as_it_was(model, two_threads, monkeypatch):
    with pytest.raises(ValueError, match="pooled width: got 47, this model takes 48"):
        row_threads.velocity(model, *inputs(2)[:3], torch.randn(2, 47))
    assert torch.get_num_threads() == 2
    here, forward = get_ident(), StreamBlock.forward

    def failing(*given):
        if get_ident() != here:
            raise FloatingPointError("of the other thread")
        assert torch.get_num_threads() == 1
        return forward(*given)

    monkeypatch.setattr(StreamBlock, "forward", failing)
    with pytest.raises(FloatingPointError, match="of the other thread"):
        row_threads.velocity(model, *inputs(2))
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("small_pictures")
def test_drawings_have_the_bits_of_one_thread_watched_or_not(ran):
    pipe = mmdit.Pipeline.demo()
    cond, uncond = (pipe.encode(text, max_sequence_length=32) for text in ("a red circle", ""))

    def latent(threads):
        torch.set_num_threads(threads)
        try:
            *_, last = pipe.sample(cond, uncond, pipe.noise(1), num_inference_steps=2)
        finally:
            torch.set_num_threads(1)
        return last.x

    found = latent(2)
    assert len({thread for _, thread in ran}) == 2
    with mmdit.capture(pipe, ["joint_blocks.3.x_block.mlp.pre"], budget=None) as captured:
        assert torch.equal(latent(2), found)
    assert len(captured)
    wanted = latent(1)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
