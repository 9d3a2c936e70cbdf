"""Compiled blocks have the gradients of blocks that are not: a loss that is right says nothing about them."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch

from full import FULL
from mmdit.demo import trainee
from mmdit.demo.bench_control import WAYS
from mmdit.demo.control_recipe import ControlRecipe
from mmdit.demo.control_step import trainer_of
from mmdit.embedded import EMBEDDED
from mmdit.pipeline.pipeline import Pipeline
from mmdit.training import blocks
from mmdit.training.barriers import add_barriers, with_barriers
from mmdit.training.blocks import compile_blocks
from quant import Float8Tensor, quantize_
from quant.training import fake_quantize_
from skips import SKIPS

CPU = pytest.param("cpu", marks=pytest.mark.skipif(not FULL, reason=SKIPS["full"]))  # compiling takes a minute
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason=SKIPS["gpu"])
GPU = pytest.param("cuda", marks=(pytest.mark.gpu, NEEDS_GPU))


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(EMBEDDED, dtype=torch.float32)


@pytest.fixture(scope="module")
def embedded(pipe):
    return pipe.transformer


def fill_free_memory():
    """NaN wherever the next tensors on the GPU will be: fresh memory is 0, and hides that it is read unwritten."""
    torch.full((2**29,), torch.nan, device="cuda")
    _ = [torch.full((2**16,), torch.nan, device="cuda") for _ in range(500)]


def gradients(model, device, autocast):
    rows = 4 if device == "cpu" else 48
    g = torch.Generator().manual_seed(1)
    parts = [torch.randn(size, generator=g).to(device) for size in ((rows, 16, 16, 16), (rows, 40, 256), (rows, 192))]
    latent, context, pooled = parts[0], 0.3 * parts[1], parts[2]
    times = torch.linspace(900.0, 100.0, rows, device=device)
    if device == "cuda":
        fill_free_memory()
    with torch.autocast(device, torch.bfloat16, enabled=autocast, cache_enabled=False):
        velocity = model(latent, times, context, pooled)
    loss = (velocity.float() * latent).mean()
    return torch.autograd.grad(loss, [one for one in model.parameters() if one.requires_grad])


def test_both_streams_are_laid_out_by_tokens(embedded):
    for sides in ((16, 16), (8, 24)):
        assert embedded.x_embedder(torch.randn(2, 16, *sides)).is_contiguous()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("kind", ["plain", "fake float8", "float8"])
def test_compiled_blocks_have_the_gradients_of_plain_ones(embedded, device, kind):
    """Of everything but float8 weights, which do not train; gradients pass through them to all that is before."""
    model = copy.deepcopy(embedded).to(device)
    model.joint_blocks = model.joint_blocks[-1:]
    if kind == "float8":
        quantize_(model, "fp8")
    for parameter in model.parameters():
        parameter.requires_grad_(not isinstance(parameter, Float8Tensor))
    if kind == "fake float8":
        fake_quantize_(model, "fp8-tensor")
    plain = gradients(model, device, kind == "fake float8")
    compile_blocks(model.joint_blocks)
    # Codes flip where sums have another order, by 6 to 12 % of a value each.
    bound = 1e-3 if kind == "plain" else 0.5
    for _ in range(1 if device == "cpu" else 3):
        for ours, wanted in zip(gradients(model, device, kind == "fake float8"), plain, strict=True):
            assert torch.linalg.vector_norm(ours - wanted) <= bound * torch.linalg.vector_norm(wanted)


class Kernel:
    """What `TritonKernel.load` is given: the code so far, and the names of tensors that earlier loops have stored."""

    def __init__(self, *stored):
        self.cse, self.lines = SimpleNamespace(invalidated_stores=set(stored)), []
        self.body = SimpleNamespace(writeline=self.lines.append)


def test_a_kernel_waits_before_it_reads_what_an_earlier_loop_has_stored(monkeypatch):
    from torch._inductor.codegen.triton import TritonKernel

    monkeypatch.setattr(TritonKernel, "load", lambda self, name, index: self.lines.append(f"{name}[{index}]"))
    for _ in range(2):  # twice, and still one barrier
        add_barriers()
    kernel = Kernel("buf1")
    for name in ("buf0", "buf1"):
        TritonKernel.load(kernel, name, 7)
    assert kernel.lines == ["buf0[7]", "tl.debug_barrier()", "buf1[7]"]


def test_every_training_that_compiles_has_the_barriers(pipe, monkeypatch):
    asked = []
    for module in (blocks, trainee):
        monkeypatch.setattr(module, "with_barriers", lambda backend: asked.append(backend) or {"backend": "eager"})
    for recorded, compiled in WAYS.values():  # of the bench of ControlNets
        asked.clear()
        trainer_of(pipe, "canny", ControlRecipe(recorded=recorded, compiled=compiled))
        assert asked == ["inductor"] * (len(pipe.transformer.joint_blocks) + 1) * compiled
    asked.clear()
    assert trainee.compile_regions(copy.deepcopy(pipe.transformer), ["blocks"]) == len(asked)
    assert len(asked) == len(pipe.transformer.joint_blocks)


def test_a_torch_that_compiles_in_another_way_is_refused(monkeypatch):
    from torch._inductor.codegen import common, triton

    monkeypatch.setattr(triton.TritonKernel, "load", lambda self, name, index: None)
    monkeypatch.setattr(common, "CSE", type("CSE", (), {}))
    with pytest.raises(RuntimeError, match=torch.__version__.split("+")[0]):
        add_barriers()


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_on_a_gpu_tensors_that_are_read_back_have_a_barrier_between():
    """Norms over 4096 values take several loops; x is laid out by channels, so that the loops' layouts differ."""
    from torch._inductor.utils import run_and_get_code

    def step(x, scale):
        y = torch.nn.functional.layer_norm(x, x.shape[-1:]) * scale
        return (y, torch.nn.functional.layer_norm(y + x, x.shape[-1:]))

    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(64, 4096, 300, generator=g, device="cuda").transpose(1, 2)
    scale = torch.randn(4096, generator=g, device="cuda")
    wanted = step(x.double(), scale.double())
    found, code = run_and_get_code(torch.compile(step, dynamic=False, **with_barriers()), x, scale)
    for _ in range(3):
        for ours, its in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), its, atol=1e-4, rtol=1e-4)
        found = torch.compile(step, dynamic=False, **with_barriers())(x, scale)
    for kernel in "\n".join(code).split("@triton.jit")[1:]:
        stored = set()
        for line in kernel.split("async_compile")[0].splitlines():
            if part := re.search(r"tl\.(store|load)\((\w+)", line):
                assert part[1] == "store" or part[2] not in stored, line
                stored |= {part[2]} if part[1] == "store" else set()
            if "debug_barrier" in line:
                stored.clear()
