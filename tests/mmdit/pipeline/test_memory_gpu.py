"""Memory budgets on a GPU: what torch reserves stays under the cap, and pictures are those of the resident model."""

import gc

import pytest
import torch

import mmdit
from mmdit.bench.random_models import fill
from mmdit.checkpoints.load_pipeline import Components
from mmdit.pipeline.failures import ExplainedMemoryError
from mmdit.pipeline.settings import digest_of
from mmdit.runtime.activations import CONTEXT
from mmdit.runtime.plan import STREAMED, VISITED, smallest
from quant.quantize import quantize_
from skips import SKIPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,  # a budget is for the whole process, so that what other tests hold would count
    pytest.mark.skipif(not torch.cuda.is_available(), reason=SKIPS["gpu"]),
]
PROMPT = "a large red circle above a blue star"
SETTINGS = {
    "num_inference_steps": 3,
    "height": 512,
    "width": 512,
    "output_type": "latent",
    "seed": 7,
    "progress": False,
}

OWN_SIZE = {"height": 1024, "width": 1024}  # for which a pipeline plans before it draws


@pytest.fixture(autouse=True)
def _nothing_of_the_test_before():
    gc.collect()
    torch.cuda.empty_cache()


def pipeline(budget, recipe=None):
    """Eight blocks of SD3.5-Medium's width (0.9 GB in bfloat16 without adaLN) on the host; the rest is the demo's."""
    demo = mmdit.Pipeline.demo(dtype=torch.bfloat16)
    config = mmdit.MMDiTConfig(8, 1536, 256, 192, 64, dual_attention_blocks=(0, 1, 2))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = mmdit.MMDiT(config).bfloat16().requires_grad_(False).eval()
    fill(model)
    if recipe:
        quantize_(model, recipe)
    parts = Components(model.cpu(), demo.vae, demo.clip_l, demo.clip_g, demo.t5, demo.tokenizers, 3.0)
    return mmdit.Pipeline(parts, memory=budget, device="cuda")


@pytest.mark.parametrize("recipe", [None, "fp8"])
def test_a_capped_device(recipe):
    pipe = pipeline("100GB", recipe)
    wanted = pipe(PROMPT, **SETTINGS).images
    assert pipe.memory_plan.rung == 0
    pipe._leave()
    least = smallest(pipe.memory_plan.models, pipe.memory_plan.activations).sum
    for budget in (least + 400_000_000, least + 150_000_000):
        pipe._set_budget(budget)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            latent = pipe(PROMPT, **SETTINGS).images
            assert torch.equal(latent, wanted)
            pipe.decode(latent)
        assert pipe.memory_plan.rung >= VISITED
        assert torch.cuda.max_memory_reserved() <= budget - CONTEXT
        assert torch.cuda.get_per_process_memory_fraction() == 1.0
    assert pipe.memory_plan.rung >= STREAMED


def test_the_first_drawing_is_one_of_weights_in_two_places():
    """As in a process that has loaded its models to the host: what is said of the weights is read on both sides."""
    pipe = pipeline("100GB", "fp8")
    wanted = digest_of(pipe.transformer)
    pipe._set_budget(smallest(pipe.memory_plan.models, pipe.memory_plan.activations).sum + 100_000_000)
    output = pipe(PROMPT, **SETTINGS | OWN_SIZE)
    assert pipe.memory_plan.streamed
    assert len({one.device for one in pipe.transformer.parameters()}) == 2
    assert output.settings[0].model_digest == wanted


def test_weights_that_visit_the_device_are_calibrated():
    found = []
    for least in (False, True):
        pipe = pipeline("100GB")  # the one before is freed, together with what it has on the device
        if least:
            budget = smallest(pipe.memory_plan.models, pipe.memory_plan.activations).sum + 400_000_000
            pipe._set_budget(budget)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found.append(mmdit.calibrate(pipe, PROMPT, 1, **OWN_SIZE).amax())
    assert pipe.memory_plan.streamed
    assert torch.cuda.max_memory_reserved() <= budget - CONTEXT
    assert all(torch.equal(amax, found[1][name]) for name, amax in found[0].items())


def test_the_fast_forward_is_streamed():
    pipe = pipeline("100GB", "fp8")
    pipe.accelerate()
    wanted = pipe(PROMPT, **SETTINGS).images
    least = smallest(pipe.memory_plan.models, pipe.memory_plan.activations).sum
    pipe._set_budget(least + 100_000_000)
    for _ in range(2):
        found = pipe(PROMPT, **SETTINGS).images
        assert (found - wanted).float().norm() <= 1e-2 * wanted.float().norm(), "another attention kernel may be chosen"
    assert pipe.memory_plan.streamed
    assert not pipe.accelerated.graph


def test_graphs_of_one_drawing():
    """Where models take turns, a drawing records its own graphs, and frees them."""
    pipe, seen = pipeline("100GB", "fp8"), []
    pipe._set_budget(None)

    def count(pipe, index, timestep, tensors):
        seen.append(len(pipe.accelerated.graphs))
        return {}

    how = SETTINGS | {"num_inference_steps": 8, "callback_on_step_end": count}
    pipe.accelerate(graph=False, attention="cudnn")
    wanted = pipe(PROMPT, **how).images
    pipe.accelerate(attention="cudnn")
    for _ in range(2):
        seen.clear()
        assert torch.equal(pipe(PROMPT, **how).images, wanted)
        assert seen[0] == 0, "weights arrive in the first step"
        assert seen[-1] == 1, "the host is slower than the GPU with so small a model"
        assert len(pipe.accelerated.graphs) == 0


def test_a_device_that_is_full():
    """Another tensor takes the memory: the error says what there is, and afterwards the pipeline draws."""
    pipe = pipeline("100GB")
    wanted = pipe(PROMPT, **SETTINGS).images
    pipe._leave()
    taken = torch.empty(max(torch.cuda.mem_get_info()[0] - 300_000_000, 1), dtype=torch.uint8, device="cuda")
    with pytest.raises(ExplainedMemoryError, match="The device has"):
        pipe(PROMPT, **SETTINGS)
    del taken
    torch.cuda.empty_cache()
    assert torch.equal(pipe(PROMPT, **SETTINGS).images, wanted)


def test_an_interrupt_while_blocks_are_streamed():
    pipe = pipeline("100GB")
    wanted = pipe(PROMPT, **SETTINGS).images
    least = smallest(pipe.memory_plan.models, pipe.memory_plan.activations).sum
    pipe._set_budget(least + 150_000_000)
    idle = torch.cuda.memory_allocated()  # workspaces of cuBLAS, which torch keeps

    def stop(*_):
        raise KeyboardInterrupt

    handle = pipe.transformer.joint_blocks[4].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, **SETTINGS)
    handle.remove()
    assert torch.cuda.memory_allocated() <= idle + 2**20
    assert all(not tensor.is_cuda for tensor in pipe.transformer.parameters())
    assert torch.equal(pipe(PROMPT, **SETTINGS).images, wanted)
