"""Several ranks compute what one computes, and a fault on one of them ends all. CPU processes over gloo, forked."""

from contextlib import contextmanager
from copy import copy

import pytest
import torch
from jaxtyping import config as jaxtyping_config

import mmdit
from encoders import Conditioning
from mmdit.models.controlnet import ControlNet, ControlNetConfig
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control import Control
from mmdit.runtime.mesh import Layout
from processes import in_processes, values

HEADS, WIDTH = 5, 16
SIZES = {"depth": 3, "hidden_size": HEADS * WIDTH, "context_dim": 256, "pooled_dim": 192, "pos_embed_size": 16}
VARIANTS = {
    "large": mmdit.MMDiTConfig(**SIZES, head_dim=WIDTH, sample_size=8),
    "mmdit-x": mmdit.MMDiTConfig(**SIZES, head_dim=WIDTH, sample_size=8, dual_attention_blocks=(0, 1)),
    "sd3-medium": mmdit.MMDiTConfig(**SIZES, head_dim=WIDTH, sample_size=8, qk_norm=None),
}
ANY = {"progress": False, "output_type": "latent", "num_inference_steps": 2, "guidance_scale": 4.5, "seed": 3}
CASES = {
    "guided": {},
    "not guided": {"guidance_scale": 1.0},
    "a layer skipped": {"skip_guidance_layers": [1]},
    "the first layer skipped": {"skip_guidance_layers": [0]},
    "perturbed attention": {"guidance": mmdit.Guidance(perturbed_layers=(1,))},
    "skipped and perturbed": {"skip_guidance_layers": [1], "guidance": mmdit.Guidance(perturbed_layers=(0, 2))},
    "adaptive projected guidance": {"guidance": mmdit.Guidance(kind="apg", momentum=-0.5)},
    "CFG-Zero*": {"guidance": mmdit.Guidance(kind="zero_star")},
    "CFG++": {"sampler": "euler_cfg_pp"},
    "two predictions a step": {"sampler": "heun"},
    "random steps": {"sampler": "euler_ancestral"},
    "several pictures": {"num_images_per_prompt": 3},
    "an odd size": {"height": 80, "width": 112},
}
FEW = ("guided", "perturbed attention", "an odd size")
ON_FOUR = {
    Layout(2, 2): (
        "large, an odd size",
        "large, single-stream ControlNet",
        "mmdit-x, skipped and perturbed",
        "mmdit-x, joint ControlNet",
        "mmdit-x, fast, several pictures",
        "decoding",
    ),
    Layout(1, 4): (
        "large, guided",
        "sd3-medium, perturbed attention",
        "mmdit-x, an odd size",
        "mmdit-x, several pictures",
        "mmdit-x, joint ControlNet",
        "sd3-medium, fast, an odd size",
    ),
    Layout(4, 1): ("mmdit-x, skipped and perturbed", "mmdit-x, random steps"),
}
LAYOUTS = {2: [Layout(2, 1), Layout(1, 2)], 4: [Layout(2, 2), Layout(1, 4), Layout(4, 1)]}


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * (
            0.1 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
        )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipes():
    """Pipelines in float64 with random transformers, by variant, and without text encoders."""
    found, demo = {}, mmdit.Pipeline.demo(dtype=torch.float64)
    demo.clip_l = demo.clip_g = demo.t5 = None
    for name, config in VARIANTS.items():
        pipe = copy(demo)
        pipe.transformer = randomized(MMDiT(config))
        found[name] = pipe
    return found


@pytest.fixture(scope="module")
def texts():
    draw = torch.Generator().manual_seed(1)
    return [
        Conditioning(
            torch.randn(1, 7, 256, generator=draw, dtype=torch.float64),
            torch.randn(1, 192, generator=draw, dtype=torch.float64),
        )
        for _ in range(2)
    ]


def nets():
    """ControlNets of both kinds."""
    common = {"hidden_size": HEADS * WIDTH, "pooled_dim": 192, "head_dim": WIDTH}
    configs = {
        "single-stream ControlNet": ControlNetConfig(depth=2, **common),
        "joint ControlNet": ControlNetConfig(depth=2, context_dim=256, pos_embed_size=16, **common),
    }
    return {name: randomized(ControlNet(config), 2) for name, config in configs.items()}


def draw(pipe, texts, options=None, control=()):
    cond, uncond = ([mmdit.Ranged(text, control=control)] for text in texts)
    return pipe(cond, uncond, **(ANY | (options or {}))).images


def near(found, wanted):
    """The relative error."""
    return float((found - wanted).norm() / wanted.norm())


def drawings(pipes, texts):
    """What is compared: functions that draw, by name."""
    hint = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = {}

    def add(name, variant, options, control=(), fast=False):
        def drawn():
            pipe = pipes[variant]
            if fast:
                pipe.accelerate()
            try:
                return draw(pipe, texts, options, control)
            finally:
                pipe.plain()

        found[f"{variant}, {name}"] = drawn

    for name, options in CASES.items():
        add(name, "mmdit-x", options)
    for variant in ("large", "sd3-medium"):
        for name in FEW:
            add(name, variant, CASES[name])
    for (name, net), variant in zip(nets().items(), ("large", "mmdit-x"), strict=True):
        add(name, variant, {}, (Control(net, hint, hint),))
    for variant in ("mmdit-x", "sd3-medium"):
        for name in ("several pictures", "an odd size", "the first layer skipped"):
            add(f"fast, {name}", variant, CASES[name], fast=True)
    latent = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found["decoding"] = lambda: pipes["large"].decode(latent)
    return found


@contextmanager
def parallel(every, layout):
    ends = [mmdit.parallelize(pipe, *layout) for pipe in every]
    try:
        yield
    finally:
        for one in ends:
            one.close()


@pytest.fixture(scope="module")
def drawn(pipes, texts):
    """Relative errors of what two and four ranks draw, by number of ranks, layout and case; one group for all."""
    every = drawings(pipes, texts)
    wanted = {name: one() for name, one in every.items()}
    for name in ("large, single-stream ControlNet", "mmdit-x, joint ControlNet"):
        assert near(wanted[name], wanted[f"{name.split(',')[0]}, guided"]) > 1e-3, "the net changes nothing"

    def work(world):
        jaxtyping_config.update("jaxtyping_disable", True)
        found = {}
        for layout in LAYOUTS[world]:
            cases = ON_FOUR[layout] if world == 4 else every
            with parallel(pipes.values(), layout):
                found[layout] = {name: near(every[name](), wanted[name]) for name in cases}
        return found

    return {world: values(in_processes(world, lambda rank, world=world: work(world))) for world in LAYOUTS}


@pytest.mark.parametrize("layout", [one for layouts in LAYOUTS.values() for one in layouts], ids=str)
def test_every_rank_draws_what_one_process_draws(drawn, layout):
    for rank, found in enumerate(drawn[layout.cfg * layout.sequence]):
        errors = found[layout]
        assert len(errors) == (len(ON_FOUR[layout]) if layout in ON_FOUR else 28)
        assert {name: error for name, error in errors.items() if not error < 1e-10} == {}, f"rank {rank}"
