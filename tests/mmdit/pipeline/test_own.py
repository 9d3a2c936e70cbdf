"""Samplers and guidance of one's own, seeds that nobody gave, devices and dtypes, threads, and what is not finite."""

import copy
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from jaxtyping import config as jaxtyping_config
from PIL import Image

import mmdit
import samplers
import tiny
from mmdit import Guidance, Pipeline, read_settings, save_png
from mmdit.runtime.devices import default_dtype, resolve_device, suited_dtype
from samplers import SOLVERS, Step

PROMPT = "a red circle above a blue square"
SMALL = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 32}


@pytest.fixture(scope="module")
def pipe(tiny_folders):
    return Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])


def euler(denoise, x, sigmas):
    for i, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        step = Step(i, following, x + (x - denoised) / sigma * (following - sigma), denoised)
        yield step
        x = step.x


def test_a_sampler_of_ones_own(pipe):
    wanted = pipe(PROMPT, seed=1, **SMALL)
    found = pipe(PROMPT, seed=1, sampler=euler, **SMALL)
    assert tiny.error(found.images, wanted.images) <= 1e-6
    assert found.settings == ()  # they cannot say it
    heun = [pipe(PROMPT, seed=1, sampler=one, **SMALL).images for one in ("heun", SOLVERS["heun"])]
    assert torch.equal(*heun)


def test_guidance_of_ones_own(pipe):
    seen = []

    def guidance(x, sigma, cond, uncond):
        seen.append((x.shape, sigma))
        return uncond + 7.0 * (cond - uncond)

    found = pipe(PROMPT, "green", seed=1, guidance=guidance, **SMALL)
    assert torch.equal(found.images, pipe(PROMPT, "green", seed=1, guidance_scale=7.0, **SMALL).images)
    assert seen == [((1, 16, 4, 4), sigma) for sigma in pipe.sigmas(3)[:-1].tolist()]
    assert found.settings == ()
    skip = {"skip_guidance_layers": (1,), "skip_layer_guidance_stop": 1.0}
    both = pipe(PROMPT, "green", seed=1, guidance=Guidance(kind=guidance, **skip), **SMALL).images
    assert torch.equal(both, pipe(PROMPT, "green", seed=1, guidance=Guidance(**skip), **SMALL).images)
    assert not torch.equal(both, found.images)
    with pytest.raises(TypeError, match="guidance function returned NoneType"):
        pipe(PROMPT, seed=1, guidance=lambda x, sigma, cond, uncond: None, **SMALL)


def test_pictures_without_a_seed_get_one(pipe):
    torch.manual_seed(4)
    drawn = pipe([PROMPT, "a ring"], **SMALL)
    seeds = [one.seed for one in drawn.settings]
    assert len(set(seeds)) == 2
    assert str(seeds[0]) in repr(drawn)
    assert torch.equal(pipe([PROMPT, "a ring"], seed=seeds, **SMALL).images, drawn.images)
    torch.manual_seed(4)
    assert torch.equal(pipe([PROMPT, "a ring"], **SMALL).images, drawn.images)


def test_several_seeds_draw_several_pictures(pipe):
    drawn = pipe(PROMPT, seed=np.array([3, 5, 8]), **SMALL)
    assert [one.seed for one in drawn.settings] == [3, 5, 8]
    assert tiny.error(drawn.images[1:2], pipe(PROMPT, seed=5, **SMALL).images) <= 1e-5


def test_sigmas_in_diffusers_form(pipe, tiny_folders):
    given = [1.0, 0.6, 0.3]
    how = {"height": 32, "width": 32, "output_type": "latent"}
    shifted = [*(3 * s / (1 + 2 * s) for s in given), 0.0]
    wanted = pipe(PROMPT, seed=1, sigmas=shifted, **how).images
    assert torch.equal(pipe(PROMPT, seed=1, sigmas=given, **how).images, wanted)
    assert torch.equal(pipe(PROMPT, seed=1, sigmas=np.array(given), num_inference_steps=3, **how).images, wanted)
    other = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"], profile="comfyui")
    with pytest.raises(ValueError, match="sigmas"):
        other(PROMPT, seed=1, sigmas=given, **how)


# ---- devices and dtypes


def test_16_bits_on_a_cpu_only_when_asked():
    assert {one.dtype for one in Pipeline.demo(dtype=None).transformer.parameters()} == {torch.float32}
    with pytest.warns(UserWarning, match="float16 is slow on a CPU"):
        pipe = Pipeline.demo(dtype=torch.float16)
    assert pipe.dtype == torch.float16
    assert pipe.to(torch.float32).dtype == torch.float32
    assert pipe.to("cpu", torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="two dtypes"):
        pipe.to(torch.float32, torch.float32)


def test_diffusers_names_of_loading(tiny_folders):
    folder = tiny_folders["sd3.5-medium"]
    assert Pipeline.from_pretrained(folder, torch_dtype=torch.float64, use_safetensors=True).dtype == torch.float64
    for arguments, said in (
        ({"dtype": torch.float32, "torch_dtype": torch.float32}, "both given"),
        ({"variant": "fp16"}, "variant is for a repository"),
    ):
        with pytest.raises(ValueError, match=said):
            Pipeline.from_pretrained(folder, **arguments)
    for arguments, said in (
        ({"text_encoder_3": None}, r"pipe\.t5 = None"),
        ({"device_map": "auto"}, "give device="),
        ({"devic": "cpu"}, "did you mean device"),
    ):
        with pytest.raises(TypeError, match=said):
            Pipeline.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps", "xpu:3", "nonsense"])
def test_devices_that_are_not_here(name):
    with pytest.raises(ValueError, match=name):
        Pipeline.demo(device=name)


@pytest.mark.parametrize(
    ("capability", "mps", "macos", "device", "dtype", "of_bfloat16"),
    [
        ((9, 0), False, False, "cuda", torch.bfloat16, torch.bfloat16),
        ((8, 0), True, True, "cuda", torch.bfloat16, torch.bfloat16),
        ((7, 5), False, False, "cuda", torch.float16, torch.float16),
        (None, True, True, "mps", torch.bfloat16, torch.bfloat16),
        (None, True, False, "mps", torch.float16, torch.float16),
        (None, False, False, "cpu", torch.float32, torch.float32),
    ],
)
def test_devices_and_dtypes_by_themselves(monkeypatch, capability, mps, macos, device, dtype, of_bfloat16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos and (major, minor) <= (14, 0)
    )
    found = resolve_device("auto")
    assert found.type == resolve_device(None).type == device
    assert default_dtype(found) == dtype
    assert suited_dtype(torch.bfloat16, found) == of_bfloat16
    assert suited_dtype(torch.float16, found) == (torch.float32 if device == "cpu" else torch.float16)
    assert suited_dtype(torch.float32, found) == torch.float32


def test_auto_is_a_device():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert Pipeline.demo(device="auto").device.type == resolve_device("auto").type


# ---- what is not finite, and shapes


@torch.no_grad()
@pytest.mark.parametrize("output_type", ["pil", "pt", "np"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vae_that_gives_no_numbers(tiny_folders, output_type, value):
    pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])
    pipe.vae.decoder.conv_out.bias[0] = value
    with pytest.raises(FloatingPointError, match=r"1024 of 3072 values of the picture"):
        pipe(PROMPT, seed=1, **(SMALL | {"output_type": output_type}))
    assert torch.isfinite(pipe(PROMPT, seed=1, **SMALL).images).all()


def test_shapes_of_the_steps(pipe):
    cond, x = pipe.encode(PROMPT), pipe.noise(1, height=32, width=32)
    for call, said in (
        (lambda: pipe.decode(torch.zeros(1, 4, 8, 8)), r"\[1, 4, 8, 8\], expected \[b, 16, h, w\]"),
        (lambda: pipe.decode(x / 0), "the latent to decode are not finite"),
        (lambda: pipe.predict(x, torch.tensor([0.5, 0.4]), [cond]), r"sigma has shape \[2\]"),
        (lambda: pipe.predict(x.expand(2, -1, -1, -1), 0.5, [cond]), "1 prompts for 2 latents"),
        (lambda: pipe.predict(x[:, :4], 0.5, [cond]), r"expected \[b, 16, h, w\]"),
        (lambda: pipe.predict(x, 0.5, []), "at least one"),
        (lambda: pipe.noise(1, count=-1), "count must be a whole number of at least 1, got -1"),
    ):
        with pytest.raises((ValueError, FloatingPointError), match=said):
            call()


# ---- settings, notebooks, copies


def test_settings_of_an_output_are_saved_as_they_are(pipe, tmp_path):
    drawn = pipe(PROMPT, seed=1, **(SMALL | {"output_type": "pil"}))
    found = read_settings(save_png(drawn.images[0], tmp_path / "a.png", drawn.settings[0]))
    assert found == drawn.settings[0].to_json()
    jaxtyping_config.update("jaxtyping_disable", True)  # signatures are checked only in tests
    try:
        with pytest.raises(TypeError, match=r"settings is tuple.*output\.settings\[0\]"):
            save_png(drawn.images[0], tmp_path / "a.png", drawn.settings)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


def test_what_is_shown(pipe, tmp_path):
    drawn = pipe([PROMPT, "a ring"], seed=[1, 2], **(SMALL | {"output_type": "pil"}))
    (tmp_path / "shown.png").write_bytes(drawn._repr_png_())
    with Image.open(tmp_path / "shown.png") as image:
        assert image.size == (64, 32)
    assert pipe(PROMPT, seed=1, **SMALL)._repr_png_() is None
    lines = repr(pipe).splitlines()
    assert len(lines) == 1 + len(pipe.models)
    assert all("float32 on cpu" in line for line in lines[1:])
    assert "quantized to fp8" in repr(Pipeline.demo(quant="fp8"))
    assert set(pipe.components) == {*pipe.models, "tokenizers"}


def test_a_copy_has_watchers_of_its_own(pipe):
    other = copy.deepcopy(pipe)
    other.watchers.append(print)
    assert pipe.watchers == []


# ---- threads


def test_two_threads_on_one_pipeline():
    """Perturbed guidance, a capture and callbacks in one thread leave plain pictures of the other as they are."""
    pipe, how = Pipeline.demo(), SMALL | {"num_inference_steps": 2}
    wanted, start, same = pipe(PROMPT, seed=1, **how).images, threading.Barrier(2), []

    def plain():
        start.wait()
        same.extend(torch.equal(pipe(PROMPT, seed=1, **how).images, wanted) for _ in range(5))

    def looked_into():
        start.wait()
        for _ in range(5):
            with mmdit.capture(pipe, "joint_blocks.1.attend.z", branch="cond", budget=None) as seen:
                pipe(PROMPT, seed=2, guidance=Guidance(perturbed_layers=(1,)), guidance_scale=3.0, **how)
            assert seen["joint_blocks.1.attend.z"].shape[0] == 2
            assert len(seen.of("joint_blocks.1.attend.z").entries) == 2
            assert pipe.guidance_scale == 3.0

    thread = threading.Thread(target=plain)
    thread.start()
    looked_into()
    thread.join()
    assert same == [True] * 5
    assert pipe.guidance_scale == 3.0  # the other thread's was 7


# ---- what is shown of it


def test_what_is_shown_fits_on_a_screen(pipe):
    """Shapes, dtypes and ranges in place of numbers, and texts that are cut."""
    cond = pipe.encode(["a red circle " * 12, "a blue star"])
    *_, last = pipe.sample(cond, cond, pipe.noise(1, count=2, height=32, width=32), num_inference_steps=2)
    low, high = (f"{float(one):.4g}" for one in last.x.aminmax())
    wanted: list[tuple[object, tuple[str, ...]]] = [
        (last, ("Step(i=1, sigma=0, ", f"x: [2, 16, 4, 4] float32 from {low} to {high}, denoised: ")),
        (samplers.Guided(last.x, None), (f"x0: [2, 16, 4, 4] float32 from {low} to {high}, uncond: None",)),
        (cond, ("2 rows of 'a red", "'a blue star'; context: [2, ", "pooled: [2, ", " float32 from ")),
        (cond.zeroed(), ("Conditioning(2 rows; context: ", "from 0 to 0")),
    ]
    for one, said in wanted:
        assert all(part in repr(one) for part in said), repr(one)
        assert len(repr(one)) < 300
    assert "from" not in repr(samplers.Step(0, 1.0, last.x.to("meta"), last.x[:0]))


def test_settings_are_shown_in_three_lines(pipe):
    few = {"num_inference_steps": 1, "height": 32, "width": 48, "guidance_scale": 4.5}
    shown = repr(pipe("a red circle " * 12, "blue", seed=7, **few).settings[0])
    for part in ("(156 characters), against 'blue'", "seed 7, 48 x 32 pixels, 1 steps of euler on normal, shift 3"):
        assert part in shown
    assert "guidance 4.5" in shown
    assert len(shown.splitlines()) == 3
    assert max(map(len, shown.splitlines())) < 200
