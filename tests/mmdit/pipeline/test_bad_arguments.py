"""Arguments of the pipeline that cannot be used, prompts that are cut, and too little memory: what is said."""

import random
import re
import traceback
import warnings

import numpy as np
import pytest
import torch
from jaxtyping import config as jaxtyping_config

import samplers
from mmdit import Pipeline, load_mmdit
from mmdit.checkpoints.lazy import LazyTensor
from refusals import refuses

SMALL = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(tiny_folders):
    return Pipeline.from_pretrained(tiny_folders["sd3.5-large"])


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Signatures are checked only in tests; the messages must come without that too."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _changes_nothing(pipe):
    """An error leaves no trace: weights, modes, random states and settings are what they were."""

    def state():
        modes = [module.training for model in pipe.models.values() for module in model.modules()]
        hooks = [len(module._forward_hooks) for model in pipe.models.values() for module in model.modules()]
        grads = [one.requires_grad for model in pipe.models.values() for one in model.parameters()]
        settings = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), pipe.profile)
        randoms = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
        return modes, hooks, grads, settings, randoms

    def contents():
        return [one.clone() for model in pipe.models.values() for one in model.state_dict().values()]

    before, weights = state(), contents()
    yield
    assert state() == before
    assert all(torch.equal(a, b) for a, b in zip(weights, contents(), strict=True))


def zeros(*shape):
    return torch.zeros(shape)


def generator():
    return torch.Generator().manual_seed(0)


VALUES = {  # what changes, what is said
    "height not of 16": ({"height": 40}, "height must be a multiple of 16 from 16 to 256, got 40; use 32"),
    "width not of 16": ({"width": 90}, "width must be a multiple of 16 from 16 to 256, got 90; use 96"),
    "height 0": ({"height": 0}, "height must be a multiple of 16 from 16 to 256, got 0; use 16"),
    "width negative": ({"width": -64}, "width must be a multiple of 16 from 16 to 256, got -64; use 16"),
    "height too large": ({"height": 1024}, "height must be a multiple of 16 from 16 to 256, got 1024; use 256"),
    "steps 0": ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1, got 0"),
    "steps negative": ({"num_inference_steps": -4}, "num_inference_steps must be a whole number of at least 1, got -4"),
    "steps 2.5": ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number of at least 1, got 2.5"),
    "no pictures": ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least 1, got 0"),
    "branch a picture": ({"num_images_per_prompt": 0.5}, "num_images_per_prompt must be a whole number of at least 1"),
    "pictures beyond 64 bits": ({"num_images_per_prompt": 2**63}, "num_images_per_prompt must be a whole number of at"),
    "too many tokens": ({"max_sequence_length": 2**50}, f"at least 2 and at most 65536, got {2**50}"),
    "no tokens": (
        {"max_sequence_length": 1},
        "max_sequence_length must be a whole number of at least 2 and at most 65536, got 1",
    ),
    "empty batch": (
        {"prompt": []},
        "the batch of prompts is empty; give at least one prompt, which may be an empty",
    ),
    "negatives": ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts; give one, or one for each"),
    "no negatives": (
        {"negative_prompt": []},
        "the batch of negative prompts is empty; give at least one negative",
    ),
    "seed, generator": ({"seed": 1, "generator": generator()}, "seed and generator are both given; give one of them"),
    "seeds": ({"seed": [1, 2], "prompt": ["a"] * 3}, "2 seeds for 3 pictures; give one whole number, or a list of"),
    "seeds, two each": ({"seed": [1], "num_images_per_prompt": 2}, "1 seeds for 2 pictures; give one whole number"),
    "seed 1.5": ({"seed": 1.5}, "a seed is a whole number of at most 64 bits, got 1.5"),
    "seed True": ({"seed": True}, "a seed is a whole number of at most 64 bits, got True"),
    "steps True": ({"num_inference_steps": True}, "num_inference_steps must be a whole number of at least 1, got True"),
    "too many steps": ({"num_inference_steps": 10**9}, "num_inference_steps must be at most 10000, got 1000000000"),
    "guidance_scale of text": ({"guidance_scale": "7"}, "guidance_scale must be a finite number, got '7'"),
    "guidance_scale beyond floats": ({"guidance_scale": 10**400}, "guidance_scale must be a finite number, got 1000"),
    "guidance_scale True": ({"guidance_scale": True}, "guidance_scale must be a finite number, got True"),
    "shift of text": ({"shift": "3"}, "unknown shift '3'"),
    "shift beyond floats": ({"shift": 10**400}, "must be a finite number of at least 0, got 1000"),
    "tile of a pixel": ({"vae_tile": 1}, "vae_tile must be a whole number of at least 16, got 1"),
    "latents of NaN": ({"latents": zeros(1, 16, 4, 4) / 0}, "256 of 256 values of latents are not finite"),
    "sparse latents": ({"latents": zeros(1, 16, 4, 4).to_sparse()}, "latents is a tensor of torch.float32"),
    "meta latents": ({"latents": zeros(1, 16, 4, 4).to("meta")}, "latents is a tensor of torch.float32"),
    "complex latents": ({"latents": zeros(1, 16, 4, 4) + 0j}, "latents is a tensor of torch.complex64"),
    "float8 latents": ({"latents": zeros(1, 16, 4, 4).to(torch.float8_e4m3fn)}, "is a tensor of torch.float8_e4m3fn"),
    "own guidance and scale": (
        {"guidance": lambda x, s, c, u: c, "guidance_scale": 4.0},
        "guidance_scale has no effect",
    ),
    "seed in a list": ({"seed": ["1"]}, "a seed is a whole number of at most 64 bits, got '1'"),
    "huge seed": ({"seed": 2**64}, "a seed is a whole number of at most 64 bits, got 18446744073709551616"),
    "generators": ({"generator": [generator()] * 2}, "2 generators for 1 pictures; give one, or a list of one per"),
    "latents, channels": (
        {"latents": zeros(1, 4, 4, 4)},
        "latents have shape [1, 4, 4, 4], expected [1, 16, height/8, ",
    ),
    "latents, count": (
        {"latents": zeros(2, 16, 4, 4)},
        "latents have shape [2, 16, 4, 4], expected [1, 16, height/8, ",
    ),
    "latents, sides": (
        {"latents": zeros(1, 16, 4)},
        "latents have shape [1, 16, 4], expected [1, 16, height/8, ",
    ),
    "latents, odd": ({"latents": zeros(1, 16, 4, 5)}, "width/8], sides in multiples of 2 up to 32"),
    "latents, large": ({"latents": zeros(1, 16, 34, 4)}, "width/8], sides in multiples of 2 up to 32"),
    "latents, none": ({"latents": zeros(1, 16, 0, 4)}, "latents have shape [1, 16, 0, 4]"),
    "latents, height": (
        {"latents": zeros(1, 16, 4, 4), "height": 64},
        "height is 64, but the height of the latents is 32",
    ),
    "latents, seed": (
        {"latents": zeros(1, 16, 4, 4), "seed": 1},
        "latents and seed are given; latents leave nothing",
    ),
    "sampler": ({"sampler": "eule"}, "unknown sampler 'eule'; did you mean 'euler'"),
    "far sampler": ({"sampler": "xyz"}, f"unknown sampler 'xyz'; Known: {', '.join(samplers.SOLVERS)}"),
    "schedule": ({"schedule": "normale"}, "unknown schedule 'normale'; did you mean 'normal'"),
    "output": ({"output_type": "pill"}, "unknown output_type 'pill'; did you mean 'pil'? Known: pil, pt, np, latent"),
}
TYPES = {
    "latents of a list": ({"latents": [[0.0]]}, "latents is list, expected a tensor"),
    "embeddings of a list": ({"prompt": None, "prompt_embeds": [0.0], "pooled_prompt_embeds": [0.0]}, "is list"),
    "a generator that is none": ({"generator": "cpu"}, "generator is str, expected a torch.Generator"),
    "guidance of a dict": (
        {"guidance": {"rescale": 0.7}},
        "guidance is dict",
    ),
    "guidance of text": ({"guidance": "apg"}, "guidance is str, expected mmdit.Guidance or a function"),
    "sampler of a number": ({"sampler": 3}, "sampler is 3, expected a name"),
    "a misspelt name": ({"guidence_scale": 3.0}, "unknown argument 'guidence_scale'; did you mean guidance_scale"),
    "a name of ComfyUI": ({"cfg": 3.0}, "cfg=3.0 is not taken here; give guidance_scale"),
    "prompt_2": ({"prompt_2": "b"}, "prompt_2='b' is not taken here"),
    "clip_skip": ({"clip_skip": 2}, "clip_skip=2 is not taken here"),
    "return_dict": ({"return_dict": False}, "return_dict=False is not taken here; a call returns a PipelineOutput"),
    "mu": ({"mu": 1.2}, "give shift=math.exp(mu)"),
    "height True": ({"height": True}, "height is bool, expected int: True"),
    "prompt": ({"prompt": 5}, "prompt is int, expected str or a list of str: 5"),
    "no prompt": ({"prompt": None}, "prompt is NoneType, expected str or a list of str: None"),
    "bytes": ({"prompt": b"a"}, "prompt is bytes, expected str or a list of str: b'a'"),
    "in a list": ({"prompt": ["a", 3]}, "prompt 1 is int, expected str: 3"),
    "none in a list": ({"prompt": ["a", None]}, "prompt 1 is NoneType, expected str: None"),
    "negative": ({"negative_prompt": 5}, "negative prompt is int, expected str or a list of str: 5"),
    "negative in a list": ({"negative_prompt": [5]}, "negative prompt 0 is int, expected str: 5"),
    "height": ({"height": "64"}, "height is str, expected int: '64'"),
    "width": ({"width": 64.0}, "width is float, expected int: 64.0"),
}


@pytest.mark.parametrize("case", [*VALUES, *(f"{name}, type" for name in TYPES)])
def test_wrong_arguments(pipe, case, monkeypatch):
    """Each is said before anything is computed."""
    changes, said = VALUES.get(case) or TYPES[case.removesuffix(", type")]
    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: pytest.fail("it was computed"))
    arguments = {"prompt": "a", "output_type": "latent"} | changes
    message = refuses(lambda: pipe(**arguments), said, error=ValueError if case in VALUES else TypeError)
    assert "\n" not in message


def test_right_arguments_are_not_refused(pipe):
    """The cases above differ from these only in what they are about."""
    torch.manual_seed(0)
    neutral = {"prompt_2": None, "clip_skip": None, "return_dict": True, "mu": None, "joint_attention_kwargs": None}
    for more in (
        {"seed": np.int64(3)},
        {"seed": [3]},
        {"seed": np.array([3])},
        {"seed": torch.tensor(3)},
        {"generator": [generator()]},
        {"latents": zeros(1, 16, 4, 4)},
        {"latents": zeros(1, 16, 4, 4), "generator": generator()},
        {"height": np.int64(32), "width": np.int32(32), "num_inference_steps": np.int64(1)},
        {"guidance_scale": np.float32(4), "shift": np.float64(2), "num_images_per_prompt": None},
        neutral,
    ):
        assert pipe("a", **(SMALL | more)).images.shape == (1, 16, 4, 4)
    assert pipe(("a", "b"), ["", "c"], **SMALL, seed=[1, 2]).images.shape == (2, 16, 4, 4)
    torch.manual_seed(0)


def test_verbs_refuse_the_same(pipe):
    refuses(lambda: pipe.encode([]), "the batch of prompts is empty", error=ValueError)
    refuses(lambda: pipe.encode("a", max_sequence_length=0), "max_sequence_length must be", error=ValueError)
    refuses(lambda: pipe.noise(1, height=40), "height must be a multiple of 16", error=ValueError)
    refuses(lambda: pipe.noise([1, 2], count=3), "2 seeds for 3 pictures", error=ValueError)
    cond, noise = pipe.encode("a"), pipe.noise(1)
    refuses(
        lambda: pipe.sample(cond, None, noise),
        "guidance_scale 7.0 needs a conditioning",
        "give uncond",
        error=ValueError,
    )
    refuses(lambda: pipe.sample(cond, cond, noise, num_inference_steps=0), "num_inference_steps must", error=ValueError)
    refuses(lambda: samplers.sigmas("normal", 0), "steps must be a whole number from 1", "got 0", error=ValueError)
    refuses(lambda: samplers.sigmas("normal", 4, shift=0), "shift must be", "above 0, got 0", error=ValueError)


def test_unknown_profile_is_said_before_anything_is_read(tmp_path):
    for load in (Pipeline.from_pretrained, Pipeline.from_single_file):
        said = "unknown profile 'difusers'; did you mean 'diffusers'? Known: diffusers"
        refuses(lambda load=load: load(tmp_path / "nothing here", profile="difusers"), said, error=ValueError)


@pytest.mark.parametrize(("words", "cut"), [(10, []), (150, ["CLIP-L", "CLIP-G"]), (500, ["CLIP-L", "CLIP-G", "T5"])])
def test_prompts_that_are_too_long_warn_with_what_was_cut(pipe, words, cut):
    prompt = " ".join(["a", "red", "circle", "above"][i % 4] for i in range(words)) + " and the end"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.encode([prompt, "short"])
    said = [str(one.message) for one in caught]
    assert [message.partition(" ")[0] for message in said] == cut
    for message in said:
        said_so = r".* reads (\d+) tokens; this part of the prompt was cut: '(.*)'(?: and (\d+) more characters)?"
        length, lost, more = re.fullmatch(said_so, message).groups()
        assert int(length) in (77, 256)
        assert prompt[: len(prompt) - int(more or 0)].endswith(lost)
        assert len(lost) > len("and the end")


# Too little memory.

HELPS = ("a smaller height and width", "num_images_per_prompt", "dtype=torch.bfloat16")


@pytest.mark.parametrize("count", [10**12, 10**18], ids=["too much", "beyond 64 bits"])
def test_noise_for_an_absurd_number_of_pictures(pipe, count, monkeypatch):
    """It fails before anything is encoded."""
    monkeypatch.setattr(pipe.clip_l, "forward", lambda *args, **kwargs: pytest.fail("a prompt was encoded"))
    said = ("out of memory while computing", f"{count} pictures at once", "Weights: transformer (MMDiT) 0.0", *HELPS)
    message = refuses(lambda: pipe("a", **SMALL, seed=0, num_images_per_prompt=count), *said, error=MemoryError)
    if count == 10**12:
        assert f"{count * 16 * 4 * 4 * 4} bytes" in message  # what was needed


def test_python_runs_out_of_memory_too(pipe, monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(pipe.transformer, "forward", full)
    said = ("out of memory while computing a step of latents [1, 16, 4, 4]", "What failed: MemoryError", *HELPS)
    refuses(lambda: pipe("a", **SMALL, seed=0), *said, error=MemoryError)


def test_out_of_memory_in_a_model(pipe, monkeypatch):
    def forward(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    said = ("out of memory while computing a step of latents [1, 16, 4, 4]", "Tried to allocate 2.00 GiB", *HELPS)
    assert "More lines" not in refuses(lambda: pipe("a", **SMALL, seed=0), *said, error=MemoryError)


def test_out_of_memory_keeps_the_error_that_the_caller_handles(pipe, monkeypatch):
    """What was raised within the drawing lets its frames go, however deep it is; the caller's own errors do not."""
    inner = RuntimeError("inner")

    def full(*args, **kwargs):
        try:
            raise inner
        except RuntimeError:
            raise MemoryError from None

    monkeypatch.setattr(pipe.transformer, "forward", full)
    try:
        raise ValueError("the caller's")
    except ValueError as handled:
        refuses(lambda: pipe("a", **SMALL, seed=0), "out of memory", error=MemoryError)
        assert [frame.name for frame in traceback.extract_tb(handled.__traceback__)] == [
            "test_out_of_memory_keeps_the_error_that_the_caller_handles"
        ]
    assert inner.__traceback__ is None


def test_other_errors_in_a_model_are_left_alone(pipe, monkeypatch):
    def forward(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    assert (
        refuses(lambda: pipe("a", **SMALL, seed=0), error=RuntimeError) == "mat1 and mat2 shapes cannot be multiplied"
    )


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_while_loading(tiny_folders, monkeypatch, error):
    read = LazyTensor.read

    def fails(self, dtype=None, device="cpu"):
        if self.shape == (128,):
            raise error
        return read(self, dtype, device)

    path = tiny_folders["sd3.5-large"] / "transformer"
    size = sum(tensor.numel() for tensor in load_mmdit(path).state_dict().values())
    monkeypatch.setattr(LazyTensor, "read", fails)
    for dtype, width in ((None, 4), (torch.bfloat16, 2)):
        said = ["out of memory on cpu while loading the transformer (MMDiT) of", path, f"it takes {size * width} bytes"]
        refuses(lambda dtype=dtype: load_mmdit(path, dtype=dtype), *said, "dtype=torch.bfloat16", error=MemoryError)
