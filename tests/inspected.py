"""What the tests of inspection look into: a small model in float64, its inputs, and what is left behind."""

from contextlib import contextmanager

import torch

import mmdit
from mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(
    depth=3, hidden_size=128, context_dim=48, pooled_dim=32, pos_embed_size=8, dual_attention_blocks=(0,)
)
TEXT, PATCHES = 5, 6  # tokens of `inputs`


def model(config=CONFIG):
    torch.manual_seed(0)
    made = MMDiT(config).double().eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def inputs(seed=1, batch=2):
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(batch, 16, 4, 6, generator=generator), torch.randn(batch, TEXT, 48, generator=generator)
    latent, context, pooled = given[0].double(), given[1].double(), torch.randn(batch, 32, generator=generator).double()
    return latent, torch.linspace(900, 20, batch), context, pooled


def left_behind(*modules):
    """Names of modules that still have hooks, or strategies in their attention."""
    return [
        name
        for module in modules
        for name, part in module.named_modules()
        if part._forward_hooks or part._forward_pre_hooks or getattr(part, "held", ())
    ]


@contextmanager
def untouched(pipe):
    """Fail if the pipeline keeps anything of what was done inside, whatever happens there."""
    try:
        yield
    finally:
        assert left_behind(*pipe.models.values()) == []
        assert pipe.watchers == []
        assert pipe.planners == []


def drawn(pipe, prompts="a red circle", steps=3, **settings):
    common = {"seed": 1, "output_type": "latent", "guidance_scale": 4.0, "max_sequence_length": 16}
    settings = common | {"num_inference_steps": steps} | settings
    return pipe(prompts, **settings).images


def encoded(pipe, prompts):
    return pipe.encode(prompts, max_sequence_length=16)


def drawn_with(demo, prompts, points, **address):
    with untouched(demo), mmdit.capture(demo, points, **address) as seen:
        drawn(demo, prompts)
    return seen
