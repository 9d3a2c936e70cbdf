"""The pipeline against diffusers' StableDiffusion3Pipeline on the same tiny random weights, step by step."""

from functools import cache
from itertools import pairwise, product

import pytest
import torch

import tiny
from float64 import references_in_float64
from full import in_full
from mmdit import Pipeline

PROMPTS = ["a red circle above a blue square", "A small star, left of two rings."]
NEGATIVES = ["green", ""]
SETTINGS = {"num_inference_steps": 4, "height": 32, "width": 48}


DTYPES = (torch.float64, torch.float32)
DIFFERENT = ("sd3-medium", "sd3.5-medium", "sd3.5-large")  # what is left out differs from the last by its name alone


@pytest.fixture(scope="module")
def both(tiny_folders):
    """`(variant, dtype) -> ours, theirs`, loaded once: for tests that change neither."""

    @cache
    def load(variant, dtype=torch.float32):
        return Pipeline.from_pretrained(tiny_folders[variant], dtype=dtype), tiny.load(tiny_folders[variant], dtype)

    return load


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_steps(pipe, **kwargs) -> list[torch.Tensor]:
    """The latents that diffusers has before the first step and after each."""
    steps = []

    def keep(_, i, t, tensors):
        steps.append(tensors["latents"].clone())
        return tensors

    pipe(**SETTINGS, **kwargs, callback_on_step_end=keep, output_type="latent")
    return steps


@pytest.mark.parametrize(
    ("variant", "dtype"),
    in_full(
        [*product(tiny.VARIANTS, DTYPES)],
        [*product(DIFFERENT, DTYPES[:1]), ("sd3.5-medium", torch.float32)],
    ),
)
def test_every_step_equals_diffusers(both, variant, dtype):
    """Each step from diffusers' own latent: its scheduler computes in float32, so 1e-6 is what can be true."""
    ours, theirs = both(variant, dtype)
    with references_in_float64():
        wanted = reference_steps(
            theirs, prompt=PROMPTS, negative_prompt=NEGATIVES, generator=seeded(3), guidance_scale=5.0
        )
    noise = ours.noise(3, count=2, height=32, width=48)
    assert torch.equal(noise, torch.randn(noise.shape, generator=seeded(3), dtype=dtype))
    cond, uncond = ours.encode(PROMPTS), ours.encode(NEGATIVES)
    steps = ours.sample(cond, uncond, noise, num_inference_steps=4, guidance_scale=5.0)
    for step, latent in zip(steps, wanted, strict=True):
        assert tiny.error(step.x, latent) <= (1e-6 if dtype == torch.float64 else 1e-4), step.i
        step.x = latent.to(step.x.dtype)


@pytest.mark.parametrize("variant", in_full([*tiny.VARIANTS], DIFFERENT))
def test_pictures_equal_diffusers(both, variant):
    ours, theirs = both(variant)
    a = ours(PROMPTS, NEGATIVES, seed=3, output_type="pt", **SETTINGS).images
    b = theirs(PROMPTS, negative_prompt=NEGATIVES, generator=seeded(3), output_type="pt", **SETTINGS).images
    assert a.shape == b.shape == (2, 3, 32, 48)
    assert float((a - b).abs().max()) <= 1e-4
    eight = ours(PROMPTS[0], seed=3, **SETTINGS).images[0]
    theirs_eight = theirs(PROMPTS[0], generator=seeded(3), **SETTINGS).images[0]
    off = torch.tensor(list(eight.tobytes())).sub(torch.tensor(list(theirs_eight.tobytes()))).abs()
    assert int(off.max()) <= 1


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"max_sequence_length": 77},
        {"max_sequence_length": 300},
        {"num_inference_steps": 1},
    ],
    ids=str,
)
def test_arguments_mean_what_they_mean_in_diffusers(both, settings):
    ours, theirs = both("sd3.5-large")
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"} | settings
    a = ours(PROMPTS[0], "blue", seed=3, **settings).images
    b = theirs(PROMPTS[0], negative_prompt="blue", generator=seeded(3), **settings).images
    assert a.shape == b.shape
    assert tiny.error(a, b) <= 1e-5


def test_conditioning_equals_diffusers(both):
    ours, theirs = both("sd3.5-large", torch.float64)
    with references_in_float64(), torch.no_grad():
        context, _, pooled, _ = theirs.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    found = ours.encode(PROMPTS)
    assert tiny.error(found.context, context) <= 1e-10
    assert tiny.error(found.pooled, pooled) <= 1e-10


def test_missing_t5_is_zeros_as_in_diffusers(tiny_folders):
    folder = tiny_folders["sd3.5-large"]
    ours, theirs = Pipeline.from_pretrained(folder), tiny.load(folder)
    ours.t5 = theirs.text_encoder_3 = None
    a = ours(PROMPTS[0], seed=3, output_type="pt", **SETTINGS).images
    b = theirs(PROMPTS[0], generator=seeded(3), output_type="pt", **SETTINGS).images
    assert tiny.error(a, b) <= 1e-5


def test_spans_say_which_word_a_token_is(both):
    ours, _ = both("sd3.5-large")
    conditioning = ours.encode(PROMPTS[0])
    (spans,) = conditioning.spans
    for encoder in ("clip_l", "clip_g", "t5"):
        words = [PROMPTS[0][span.start : span.stop] for span in spans if span.encoder == encoder]
        assert "circle" in words
        assert "square" in words
    first_t5 = next(span for span in spans if span.encoder == "t5")
    assert first_t5.position == 77
    assert conditioning.context.shape[1] == 77 + 256


def test_one_seed_per_picture_is_the_seed_alone(both):
    ours, _ = both("sd3-medium")
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    both = ours(PROMPTS, seed=[8, 9], **settings).images
    for row, seed in enumerate((8, 9)):
        assert tiny.error(both[row], ours(PROMPTS[row], seed=seed, **settings).images[0]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_pictures_are_as_good_as_the_reference(tiny_folders, dtype):
    """At most twice the error that diffusers has at this dtype against float64 of the same (rounded) weights."""
    folder = tiny_folders["sd3.5-large"]
    low, low_reference = Pipeline.from_pretrained(folder, dtype=dtype), tiny.load(folder, dtype)
    latents = torch.randn(1, 16, 4, 6).to(dtype)
    found = low(PROMPTS[0], latents=latents, output_type="latent", **SETTINGS).images
    wanted = low_reference(PROMPTS[0], latents=latents, output_type="latent", **SETTINGS).images
    truth = low.to(dtype=torch.float64)(PROMPTS[0], latents=latents.double(), output_type="latent", **SETTINGS).images
    assert tiny.error(found, truth) <= 2 * tiny.error(wanted, truth)


def test_a_wrong_sigma_is_noticed(tiny_folders):
    """The bound of the step test against an off-by-one in the schedule."""
    folder = tiny_folders["sd3.5-large"]
    ours, theirs = Pipeline.from_pretrained(folder), tiny.load(folder)
    wanted = reference_steps(theirs, prompt=PROMPTS[0], generator=seeded(3), guidance_scale=5.0)
    ours.sigmas = lambda *_: Pipeline.sigmas(ours, 5)[1:]
    noise = ours.noise(3, height=32, width=48)
    steps = ours.sample(ours.encode(PROMPTS[0]), ours.encode(""), noise, guidance_scale=5.0)
    assert tiny.error(next(iter(steps)).x, wanted[0]) > 1e-4


def test_save_and_load_give_the_same_picture(tiny_folders, tmp_path):
    pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])
    settings = {"num_inference_steps": 2, "seed": 1, "output_type": "pt"}
    wanted = pipe(PROMPTS[0], **settings).images
    for layout in ("official", "diffusers"):
        again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / layout, layout))
        assert torch.equal(again(PROMPTS[0], **settings).images, wanted)
        assert again.shift == pipe.shift


def test_a_loop_of_ones_own_draws_the_same(both):
    """The verbs alone: predictor, guidance and Euler written out in a notebook."""
    pipe, _ = both("sd3.5-medium")
    predict = pipe.predictor(cond=pipe.encode(PROMPTS[0]), uncond=pipe.encode(""))
    x, levels = pipe.noise(4), pipe.sigmas(3).tolist()
    for sigma, following in pairwise(levels):
        given, without = predict(x, sigma)
        x = x + (x - (without + 7.0 * (given - without))) / sigma * (following - sigma)
    wanted = pipe(PROMPTS[0], seed=4, num_inference_steps=3, guidance_scale=7.0, output_type="pt").images
    assert tiny.error(pipe.decode(x), wanted) <= 1e-5
