"""One rank of `test_parallel_gpu.py`: draws alone and with the other ranks, and prints how they differ, or fails.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=29511 python tests/parallel_on_gpus.py equal
"""

import json
import os
import signal
import sys
import time

import torch

import mmdit
from mmdit.checkpoints.load_pipeline import Components
from mmdit.models.mmdit import MMDiT
from mmdit.runtime import bands
from mmdit.runtime.plan import smallest

START = time.monotonic()
RANK, CASE = int(os.environ["RANK"]), sys.argv[1]
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", RANK) if CUDA else torch.device("cpu")
if CUDA:
    torch.cuda.set_device(DEVICE)  # Triton launches on the current device
    torch.backends.cudnn.allow_tf32 = False  # the VAE's convolutions round to TF32 by default, which hides 1e-4
ANY = {"progress": False, "output_type": "latent", "num_inference_steps": 4, "guidance_scale": 3.0, "seed": 3}
SIDE = 512 if CUDA else 64


def pipeline(quant: str | None, dtype: torch.dtype, depth: int = 3) -> mmdit.Pipeline:
    """The embedded model with a random transformer of five heads and so many blocks."""
    pipe = mmdit.Pipeline.demo(device=DEVICE, dtype=dtype)
    torch.manual_seed(0)
    config = mmdit.MMDiTConfig(depth, 320, 256, 192, 64, sample_size=64, dual_attention_blocks=(0,))
    pipe.transformer = MMDiT(config)
    for tensor in pipe.transformer.parameters():
        tensor.data.normal_(std=0.5 * tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.1)
    pipe.transformer.to(DEVICE, dtype).eval().requires_grad_(False)
    if quant is not None:
        mmdit.quant.quantize_(pipe.transformer, mmdit.quant.RECIPES[quant])
    return pipe


def draw(pipe: mmdit.Pipeline, **options: object) -> torch.Tensor:
    return pipe("a red circle", height=SIDE, width=SIDE, **(ANY | options)).images.float()


def near(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def differences() -> dict[str, object]:
    """By case, the relative error against one float32 rank, and twice that of one rank in the same arithmetic.

    `again` draws twice in one layout: from the recorded graphs. `decoded` is in bands, whatever the size.
    """
    found: dict[str, object] = {}
    half = torch.bfloat16 if CUDA else torch.float32
    plain = pipeline(None, torch.float32)
    exact = draw(plain)
    bands.WORTH = bands.WORTH_GRAPH = 0
    for name, quant, dtype, fast in (
        ("float32", None, torch.float32, False),
        ("16 bits fast", None, half, True),
        ("fp8 fast", "fp8", half, True),
    ):
        pipe = pipeline(quant, dtype)
        if fast:
            pipe.accelerate(attention="flash")  # so that nothing is measured, and less compiled
        alone = draw(pipe)
        exact_picture, picture = plain.decode(alone).float(), pipe.decode(alone.to(dtype)).float()
        limits = [2 * near(alone, exact) + 1e-4, 2 * near(picture, exact_picture) + 1e-4]
        for layout, exchange in (((2, 1), "auto"), ((1, 2), "auto"), ((1, 2), "nccl")):
            if exchange == "nccl" and not fast:
                continue
            parallel = mmdit.parallelize(pipe, *layout, exchange=exchange)
            case = f"{name}, {parallel.layout}, {parallel.exchange or 'branches'}"
            found[case] = near(draw(pipe), exact), limits[0]
            found[f"{case}, again"] = near(draw(pipe), exact), limits[0]
            for time_ in ("decoded", "decoded again"):  # from a graph
                found[f"{case}, {time_}"] = near(pipe.decode(alone.to(dtype)).float(), exact_picture), limits[1]
            print(f"{time.monotonic() - START:.0f} s: {case}; {parallel.choices}", file=sys.stderr, flush=True)
            assert not parallel.decoder.why_not, parallel.decoder.why_not
            parallel.close()
    return found


def budgets() -> dict[str, object]:
    """By case, the relative error against one float32 rank with its limit, and gigabytes of the GPU with the budget."""
    found: dict[str, object] = {}
    if CUDA:  # which a parallel run takes for its own
        free, total = torch.cuda.mem_get_info()
        found["GB of this GPU that other processes hold, beside a context"] = (total - free) / 1e9, 2.0
    exact = draw(pipeline(None, torch.float32, 12))
    for fast in (False, True):
        whole = pipeline(None, torch.bfloat16 if CUDA else torch.float32, 12)
        models = (whole.transformer, whole.vae, whole.clip_l, whole.clip_g, whole.t5)
        pipe = mmdit.Pipeline(Components(*models, whole.tokenizers, 3.0), memory="100GB", device=DEVICE)
        del whole, models
        if fast:
            pipe.accelerate(attention="flash")
        limit = 2 * near(draw(pipe), exact) + 1e-4
        for layout in ((2, 1), (1, 2)):
            parallel = mmdit.parallelize(pipe, *layout)
            draw(pipe)
            assert pipe.memory_plan is not None, "there is a budget"
            budget = smallest(pipe.memory_plan.models, pipe.memory_plan.activations).sum + 50_000_000
            of_ranks = parallel.mesh.world.gathered(torch.tensor([budget], device=DEVICE))
            pipe._set_budget(int(of_ranks.max()))
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            case = f"{'fast' if fast else 'plain'}, {parallel.layout}"
            found[case] = near(draw(pipe), exact), limit
            assert pipe.memory_plan is not None, "there is a budget"
            found[f"{case}, streamed"] = -len(pipe.memory_plan.streamed), -1
            if CUDA:
                free, total = torch.cuda.mem_get_info()
                beside = total - free - torch.cuda.memory_reserved()
                found[f"{case}, GB"] = (torch.cuda.max_memory_reserved() + beside) / 1e9, pipe._budget / 1e9
            parallel.close()
            pipe._set_budget(10**11)
    return found


def fault() -> None:
    """Fail on rank 1 in the middle of a drawing, while rank 0 waits for it on the GPU.

    `cfg` waits in NCCL's gather, `sequence` in a graph for stores of the other GPU, `kernels` in NCCL's all-to-all.
    """
    pipe = pipeline(None, torch.bfloat16 if CUDA else torch.float32)
    what, layout = CASE.split("-")
    pipe.accelerate(graph=False if layout == "kernels" or not CUDA else None, attention="flash")
    by_nccl = layout == "kernels"
    parallel = mmdit.parallelize(pipe, 2 if layout == "cfg" else 1, exchange="nccl" if by_nccl else "auto")
    print(parallel, file=sys.stderr, flush=True)
    draw(pipe)
    start = time.monotonic()

    def at(pipe: object, step: int, timestep: object, tensors: dict[str, object]) -> dict[str, object]:
        if RANK == 1 and step == 1:
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OverflowError("of the callback")
        return tensors

    try:
        draw(pipe, callback_on_step_end=at, num_inference_steps=20)
    finally:
        print(f"ended after {time.monotonic() - start:.1f} s", flush=True)


if CASE == "equal":
    print(json.dumps(differences()), flush=True)
elif CASE == "budget":
    print(json.dumps(budgets()), flush=True)
else:
    fault()
