"""Rows of a batch in threads of their own: the results of one thread, who computes what, and what is left behind."""

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread, get_ident

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
from mmdit.runtime.compiled import modules_of
from quant.quantize import quantize_

CONFIG = MMDiTConfig(3, 128, 96, 48, 16, qk_norm="rms", dual_attention_blocks=(1,))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = MMDiT(CONFIG).requires_grad_(False)
    for one in model.parameters():
        one.normal_(std=0.1)
    row_threads.use(model)
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


def rows_are_apart():
    """Whether the products of a row are surely independent of the rows below it: MKL's of Intel's AVX-512."""
    cpus = Path("/proc/cpuinfo")
    known = torch.backends.mkl.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return known and cpus.exists() and "GenuineIntel" in cpus.read_text()


def assert_bits_of_one_thread(found, wanted, tolerance):
    """Where rows are surely apart; elsewhere, equal but for roundings."""
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert torch.equal(found, wanted) or not rows_are_apart()


def inputs(rows):
    torch.manual_seed(2)
    latent, context = torch.randn(rows, 16, 16, 12), torch.randn(rows, 40, 96)
    return latent, torch.full((rows,), 700.0), context, torch.randn(rows, 48)


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("changes", [{}, {"skip_layers": (1,)}, {"control": ...}, {"control": 1}])
def test_rows_give_what_the_forward_gives(model, two_threads, ran, rows, changes):
    given = inputs(rows)
    if "control" in changes:
        held = rows if changes["control"] is ... else changes["control"]
        changes = {"control": [torch.randn(held, 48, 128), None, torch.randn(rows, 48, 128)]}
    found = row_threads.velocity(model, *given, **changes)
    of_threads = {thread: {rows for rows, of in ran if of == thread} for _, thread in ran}
    assert of_threads.pop(get_ident()) == {rows - rows // 2}
    assert [*of_threads.values()] == [{rows // 2}]
    torch.set_num_threads(1)
    assert_bits_of_one_thread(found, model(*given, **changes), 2e-6)


def test_only_small_models_with_a_row_for_each_thread_suit(model, two_threads, monkeypatch):
    latent = inputs(2)[0]
    assert row_threads.suits(model, latent)
    assert not row_threads.suits(model, latent[:1])
    assert not row_threads.suits(model, latent.to("meta"))
    double, several, quantized = MMDiT(CONFIG).double(), torch.nn.Sequential(model), MMDiT(CONFIG)
    for one in (double, several, quantized):
        row_threads.use(one)
    assert not row_threads.suits(double, latent)
    assert not row_threads.suits(several, latent)
    quantize_(quantized, "fp8", select=["joint_blocks.2.x_block.mlp.fc2"])
    assert not row_threads.suits(quantized, latent)
    monkeypatch.setattr(row_threads, "_WIDEST", 127)
    assert not row_threads.suits(model, latent)
    monkeypatch.undo()
    assert not row_threads.suits(copy.deepcopy(model), latent)  # nobody has asked for it
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


@contextmanager
def replaced(module, name, value):
    """Inside, a module or an attribute of a module is another one."""
    before, held = getattr(module, name), name in vars(module) | module._modules
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before) if held else delattr(module, name)


class Mixing(torch.nn.Module):
    """What it gives for a row depends on those beside it."""

    def forward(self, x):
        return x + x.mean(0, keepdim=True)


WATCHED = {
    "mode": lambda model: Mode(),
    "profiler": lambda model: torch.autograd.profiler.profile(use_kineto=False),
    "autocast": lambda model: torch.autocast("cpu", torch.float16, enabled=True),
    "hook": lambda model: hooked(model.joint_blocks[0].attend),
    "global hook": lambda model: register_module_forward_hook(lambda *_: None),
    "replaced module": lambda model: replaced(model.joint_blocks[0].x_block, "resid_mid", Mixing()),
    "replaced method": lambda model: replaced(model, "unpatchify", lambda *given: MMDiT.unpatchify(model, *given)),
    "strategy": lambda model: attending([(model.joint_blocks[1].attend2, SelfOnly(0))]),
}


@pytest.mark.parametrize("watcher", WATCHED)
def test_the_forward_computes_all_rows_where_it_is_watched(model, two_threads, ran, watcher):
    if watcher == "autocast":
        model = MMDiT(replace(CONFIG, qk_norm=None)).requires_grad_(False)  # torch warns of mixed norms
    handle = WATCHED[watcher](model)
    with handle if hasattr(handle, "__enter__") else nullcontext():
        found = row_threads.velocity(model, *inputs(2))
        wanted = model(*inputs(2))
        assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()
    assert {*ran} == {(2, get_ident())}


def test_modules_are_those_that_models_are_built_of():
    models = MMDiT(CONFIG), MMDiT(replace(CONFIG, qk_norm=None))
    modules = [module for model in models for module in modules_of(model)]
    assert {type(module) for module in modules} == row_threads._PARTS
    assert all(map(row_threads._is_part, modules))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention, which torch computes row by row
def test_the_forward_is_transformed_by_torch_func(model, two_threads, ran):
    latent, *others = inputs(2)
    several = torch.stack([latent, latent + 1])
    found = torch.func.vmap(lambda one: row_threads.velocity(model, one, *others))(several)
    assert {*ran} == {(2, get_ident())}
    wanted = torch.stack([model(one, *others) for one in several])
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def test_the_forward_computes_all_rows_where_gradients_are_needed(model, two_threads, ran):
    row_threads.velocity(MMDiT(CONFIG), *inputs(2)).sum().backward()
    for i in range(5):
        *given, residual = *inputs(2), torch.randn(2, 48, 128)
        needed = [*given, residual][i].requires_grad_()
        row_threads.velocity(model, *given, control=[residual, None, None]).sum().backward()
        assert needed.grad is not None
    assert {*ran} == {(2, get_ident())}


def test_watched_steps_of_several_threads_run_at_the_same_time(model, two_threads):
    both, met = Barrier(2), []

    def step():
        torch.set_num_threads(2)
        row_threads.velocity(model, *inputs(2))

    handle = model.joint_blocks[1].register_forward_hook(lambda *_: met.append(both.wait(timeout=20)))
    threads = [Thread(target=step) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        handle.remove()
    assert sorted(met) == [0, 1]


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
def test_drawings_have_the_bits_of_watched_ones_unless_threads_are_asked_for(ran):
    pipe = mmdit.Pipeline.demo()
    cond, uncond = (pipe.encode(text, max_sequence_length=32) for text in ("a red circle", ""))

    def latent(threads):
        torch.set_num_threads(threads)
        try:
            *_, last = pipe.sample(cond, uncond, pipe.noise(1), num_inference_steps=2)
        finally:
            torch.set_num_threads(1)
        return last.x

    plain = latent(2)
    assert len({thread for _, thread in ran}) == 1
    with mmdit.capture(pipe, ["joint_blocks.3.x_block.mlp.pre"], budget=None) as captured:
        watched = latent(2)
    assert len(captured)
    assert torch.equal(plain, watched)
    wanted = latent(1)
    row_threads.use(pipe.transformer)
    found = latent(2)
    assert len({thread for _, thread in ran}) == 2
    assert_bits_of_one_thread(found, wanted, 1e-5)
