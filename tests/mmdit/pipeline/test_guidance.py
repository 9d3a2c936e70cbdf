"""Guidance in a drawing: against diffusers' pipelines where it has them, by formula elsewhere; and what is refused."""

from itertools import pairwise

import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline

import tiny
from float64 import references_in_float64
from mmdit import PROFILES, Guidance, Pipeline, Ranged
from mmdit.models.attention import SelfOnly
from mmdit.pipeline.passes import Branch, perturbed
from refusals import refuses
from samplers import level_at

PROMPTS = ["a red circle above a blue square", "A small star, left of two rings."]
SMALL = {"height": 32, "width": 48, "num_inference_steps": 6}
SKIP = {"skip_guidance_layers": [1]}


@pytest.fixture(scope="module")
def pipes(tiny_folders) -> dict[str, Pipeline]:
    folder = tiny_folders["sd3.5-medium"]
    return {name: Pipeline.from_pretrained(folder, profile=name, dtype=torch.float64) for name in PROFILES}


@pytest.fixture(scope="module")
def theirs(tiny_folders):
    return tiny.load(tiny_folders["sd3.5-medium"], torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def watched(pipe: Pipeline, call) -> list[tuple[int, tuple[str, ...]]]:
    """Step and branches of each pass that a call makes."""
    seen = []
    pipe.watchers.append(lambda one: seen.append((one.step, tuple(branch.name for branch in one.branches))))
    try:
        call()
    finally:
        pipe.watchers.clear()
    return seen


# ---- skip-layer guidance


@pytest.mark.parametrize(
    ("settings", "skipping"),
    [
        (SKIP, [1]),
        ({"skip_guidance_layers": [0, 2], "skip_layer_guidance_scale": 1.5, "skip_layer_guidance_start": 0.4}, []),
        (
            {"skip_guidance_layers": [0, 2], "skip_layer_guidance_start": 0.34, "skip_layer_guidance_stop": 0.67},
            [3, 4],
        ),
        (SKIP | {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}, [1, 2, 3, 4, 5]),
        (SKIP | {"guidance_scale": 1.0}, []),
    ],
    ids=str,
)
def test_skip_layers_equal_diffusers(pipes, theirs, settings, skipping):
    """Picture and passes; at scale 1 diffusers has one pass of one half and skips nothing, whatever was asked for."""
    pipe, settings = pipes["diffusers"], SMALL | {"output_type": "latent", "guidance_scale": 5.0} | settings
    if "skip_layer_guidance_start" in settings and "skip_layer_guidance_stop" not in settings:
        refuses(lambda: pipe("a", **settings), "start 0.4 is after skip_layer_guidance_stop 0.2", error=ValueError)
        return
    found = {}
    passes = watched(pipe, lambda: found.update(ours=pipe(PROMPTS, "green", seed=3, **settings).images))
    branches = ("cond",) if settings["guidance_scale"] == 1 else ("uncond", "cond")
    expected = [[(i, branches)] + [(i, ("skip",))] * (i in skipping) for i in range(6)]
    assert passes == [one for several in expected for one in several]
    with references_in_float64():
        wanted = theirs(PROMPTS, negative_prompt=["green"] * 2, generator=seeded(3), **settings).images
    assert tiny.error(found["ours"], wanted) <= 2e-6  # its scheduler steps in float32
    if skipping:
        other = pipe(PROMPTS, "green", seed=3, **(settings | {"skip_layer_guidance_scale": 2.7})).images
        assert tiny.error(other, wanted) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("scale", "rescale"), [(4.0, 0.0), (4.0, 0.7), (1.0, 0.0)])
def test_skip_layers_of_comfyui_by_formula(pipes, scale, rescale):
    """Levels from 1 % to 15 % of the way, scale 3, also without an unconditional pass; std rescaling of the picture."""
    pipe = pipes["comfyui"]
    how = Guidance(skip_guidance_layers=(0, 1), skip_layer_rescale=rescale)
    levels, settings = pipe.sigmas(20)[[*range(5), 10, 20]], {"height": 32, "width": 48, "output_type": "latent"}
    settings |= {"sigmas": levels, "guidance_scale": scale, "guidance": how, "seed": 3}
    found = pipe(PROMPTS[0], "green", **settings).images
    cond, uncond, x = pipe.encode(PROMPTS[0]), pipe.encode("green"), pipe.noise(3, height=32, width=48)
    skipped = 0
    for level, following in pairwise(levels.tolist()):
        c, u, s = pipe.predict(x, level, [cond, uncond, Branch(cond, "skip", (0, 1))])
        x0 = u + (c - u) * scale
        if level_at(0.01, 3.0) >= level >= level_at(0.15, 3.0):
            skipped += 1
            x0 = x0 + (c - s) * 3.0
            x0 = x0 * (rescale * c.std() / x0.std() + 1 - rescale)
        x = x + (x - x0) / level * (following - level)
    assert skipped == 2
    assert tiny.error(found, x) <= 1e-6


def test_skip_layers_of_the_reference_are_its_steps_and_scale(pipes):
    """Step > .01 n and < .2 n, scale 2.5; n of 10 is 1, as step 2 is not below 2."""
    pipe, cond = pipes["reference"], pipes["reference"].encode("a")
    noise, how = pipe.noise(1, height=32, width=32), Guidance(skip_guidance_layers=(1,))
    passes = watched(pipe, lambda: list(pipe.sample(cond, cond, noise, num_inference_steps=10, guidance=how)))
    assert [step for step, branches in passes if branches == ("skip",)] == [1]
    settled = how.of(pipe.profile)
    assert (settled.skip_layer_guidance_scale, settled.skip_layer_guidance_stop) == (2.5, 0.2)
    defaults = [(p.skip_scale, p.skip_start, p.skip_stop, p.skip_window) for p in PROFILES.values()]
    assert defaults == [(2.8, 0.01, 0.2, "steps"), (3.0, 0.01, 0.15, "percents"), (2.5, 0.01, 0.2, "steps")]


# ---- perturbed attention


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_perturbed_attention_equals_diffusers(tiny_folders, scale):
    """SD3-Medium: diffusers' processors for it leave out the QK-norm that SD3.5 has."""
    folder = tiny_folders["sd3-medium"]
    ours = Pipeline.from_pretrained(folder, dtype=torch.float64)
    parts = tiny.load(folder, torch.float64).components
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    theirs = StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    theirs.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": scale, "output_type": "latent", "height": 32, "width": 48, "num_inference_steps": 3}
    with references_in_float64():
        wanted = theirs(PROMPTS[0], negative_prompt="green", generator=seeded(3), pag_scale=2.0, **settings).images

    def drawn(layers, push):
        how = Guidance(perturbed_layers=layers, perturbed_scale=push)
        return ours(PROMPTS[0], "green", seed=3, guidance=how, **settings).images

    assert tiny.error(drawn((1,), 2.0), wanted) <= 2e-6
    assert tiny.error(drawn((0,), 2.0), wanted) > 1e-4
    assert tiny.error(drawn((1,), 2.1), wanted) > 1e-4


def test_image_tokens_see_themselves_and_the_text():
    q, k, v = (torch.randn(2, 3, 9, 8, generator=seeded(i), dtype=torch.float64) for i in range(3))
    found = SelfOnly(4).output(q, k, v)
    full = (q @ k.mT / 8**0.5).softmax(-1) @ v
    torch.testing.assert_close(found[:, :, :4], full[:, :, :4], rtol=0, atol=1e-12)
    for i in range(4, 9):
        seen = [0, 1, 2, 3, i]
        wanted = (q[:, :, i, None] @ k[:, :, seen].mT / 8**0.5).softmax(-1) @ v[:, :, seen]
        torch.testing.assert_close(found[:, :, i, None], wanted, rtol=0, atol=1e-12)
    assert torch.equal(SelfOnly(0).output(q, k, v), v)


def test_blocks_have_their_own_attention_back_whatever_happens(pipes):
    model = pipes["diffusers"].transformer
    own = {name: module for name, module in model.named_modules() if ".attend" in name}
    assert len(own) == 5  # MMDiT-X: three joint, two of the image alone
    with pytest.raises(RuntimeError, match="enough"), perturbed(model, (0, 2), 77):
        inside = {name: module.strategies for name, module in own.items() if module.strategies}
        assert list(inside) == ["joint_blocks.0.attend", "joint_blocks.0.attend2", "joint_blocks.2.attend"]
        assert all(isinstance(one, SelfOnly) for (one,) in inside.values())
        assert [one.text for (one,) in inside.values()] == [77, 0, 77]
        raise RuntimeError("enough")
    assert not any(module.held for module in own.values())


def test_a_perturbed_branch_runs_apart_and_differs(pipes):
    pipe = pipes["diffusers"]
    cond, x = pipe.encode("a"), pipe.noise(1, height=32, width=32)
    found = {}
    branches = [Branch(cond), Branch(cond, "perturbed", (), (0,)), Branch(cond, "uncond")]
    assert watched(pipe, lambda: found.update(x0=pipe.predict(x, 0.7, branches))) == [
        (None, ("cond", "uncond")),
        (None, ("perturbed",)),
    ]
    plain, other, again = found["x0"]
    assert tiny.error(again, plain) < 1e-12  # places in a batch are not equal to the bit on every processor
    assert tiny.error(other, plain) > 1e-4


# ---- conditionings for parts of the way


@torch.no_grad()
def test_the_negative_of_comfyuis_workflow_by_formula(pipes):
    """Real for 0 to 10 %, zeroed after; the level where ranges meet is in both, and averaged."""
    pipe = pipes["comfyui"]
    cond, bad = pipe.encode(PROMPTS[0]), pipe.encode("green")
    zeroed = bad.zeroed()
    assert not zeroed.context.any()
    assert not zeroed.pooled.any()
    meeting = level_at(0.1, 3.0)
    levels = torch.tensor([1.0, 0.98, meeting, 0.7, 0.0], dtype=torch.float64)
    negative = [Ranged(bad, 0.0, 0.1), Ranged(zeroed, 0.1, 1.0)]
    x = noise = pipe.noise(3, height=32, width=48)
    for level, following in pairwise(levels.tolist()):
        c, real, none = pipe.predict(x, level, [cond, bad, zeroed])
        u = (real + none) / 2 if level == meeting else real if level > meeting else none
        x = x + (x - (u + (c - u) * 4.0)) / level * (following - level)
    found = {}
    passes = watched(
        pipe, lambda: found.update(steps=list(pipe.sample(cond, negative, noise, sigmas=levels, guidance_scale=4.0)))
    )
    assert tiny.error(found["steps"][-1].x, x) <= 1e-6
    assert [len(branches) for _, branches in passes] == [2, 2, 3, 2]
    called = pipe(cond, negative, latents=noise, sigmas=levels, guidance_scale=4.0, output_type="latent")
    assert torch.equal(called.images, found["steps"][-1].x.double())


@torch.no_grad()
def test_encoded_prompts_of_a_call(pipes):
    pipe, few = pipes["diffusers"], SMALL | {"num_inference_steps": 2, "output_type": "latent", "seed": [1, 2]}
    wanted = pipe(PROMPTS, "green", **few)
    encoded = pipe(pipe.encode(PROMPTS), pipe.encode(["green"] * 2), **few)
    assert torch.equal(encoded.images, wanted.images)
    assert encoded.settings == ()
    ranged = pipe([Ranged(pipe.encode(PROMPTS[0]))], [Ranged(pipe.encode("green"))], num_images_per_prompt=2, **few)
    alone = pipe(PROMPTS[0], "green", num_images_per_prompt=2, **few)
    assert torch.equal(ranged.images, alone.images)
    changed = [Ranged(pipe.encode(PROMPTS[0]), 0.0, 0.5), Ranged(pipe.encode(PROMPTS[1]), 0.5, 1.0)]
    assert tiny.error(pipe(changed, "green", num_images_per_prompt=2, **few).images, alone.images) > 1e-3


# ---- everything together


def test_branches_share_a_batch_unless_they_run_one_by_one(pipes):
    pipe, few = pipes["comfyui"], SMALL | {"num_inference_steps": 2, "output_type": "latent", "seed": 1}
    how = {"skip_guidance_layers": (1,), "skip_layer_guidance_stop": 1.0, "perturbed_layers": (0,)}
    found = {}
    together = watched(pipe, lambda: found.update(a=pipe("a", guidance=Guidance(**how), **few).images))
    first = [(0, ("uncond", "cond")), (0, ("perturbed",))]
    assert together == [*first, (1, ("uncond", "cond")), (1, ("skip",)), (1, ("perturbed",))]
    apart = watched(pipe, lambda: found.update(b=pipe("a", guidance=Guidance(**how, sequential=True), **few).images))
    assert [branches for _, branches in apart] == [(branch,) for _, branches in together for branch in branches]
    assert tiny.error(found["b"], found["a"]) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["apg", "zero_star"])
def test_a_drawing_with_all_of_it_by_formula(pipes, kind):
    pipe, levels = pipes["comfyui"], pipes["comfyui"].sigmas(6)
    how = Guidance(
        kind=kind, interval=(0.2, 0.97), rescale=0.5, eta=0.3, threshold=4.0, momentum=-0.5, zero_init=1,
        perturbed_layers=(0,), perturbed_scale=1.5, perturbed_interval=(0.0, 0.9),
    )  # fmt: skip
    found = pipe(PROMPTS[0], seed=3, guidance_scale=4.0, guidance=how, output_type="latent", **SMALL).images
    cond, uncond, x = pipe.encode(PROMPTS[0]), pipe.encode(""), pipe.noise(3, height=32, width=48)
    before, mixed = torch.zeros_like(x), 0
    for i, (level, following) in enumerate(pairwise(levels.tolist())):
        c, u, p = pipe.predict(x, level, [cond, uncond, Branch(cond, "perturbed", (), (0,))])
        x0 = c
        if 0.2 < level <= 0.97:
            mixed += i > 0
            if kind == "apg" and i:
                before = push = c - u - 0.5 * before
                push = push * min(1.0, 4.0 / float(push.norm()))
                along = (push * c).sum() / c.norm() ** 2 * c
                x0 = c + 3.0 * (push - along + 0.3 * along)
            elif i:
                vc, vu = (x - c) / level, (x - u) / level
                star = (vc * vu).sum() / (vu * vu).sum()
                x0 = x - level * (star * vu + 4.0 * (vc - star * vu))
        if level <= 0.9:
            x0 = x0 + 1.5 * (c - p)
        v, given = (x - x0) / level, (x - c) / level
        v = 0.5 * v * given.std() / v.std() + 0.5 * v
        x = x + (v if i else 0) * (following - level)
    assert 0 < mixed < 5
    assert tiny.error(found, x) <= 2e-6


def test_turbo_is_one_pass_of_one_branch_per_step(tiny_folders):
    for profile in ("diffusers", "comfyui"):
        pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-large"], preset="turbo", profile=profile)
        passes = watched(pipe, lambda pipe=pipe: pipe("a", seed=1, height=32, width=32, output_type="latent"))
        assert passes == [(i, ("cond",)) for i in range(4)]


def test_solvers_that_take_uncond_get_a_pass_at_every_scale(pipes):
    pipe, cond = pipes["diffusers"], pipes["diffusers"].encode("a")
    x = pipe.noise(1, height=32, width=32)

    def guide(sampler):
        plan = pipe._plan(x.shape, num_inference_steps=2, guidance_scale=1.0, sampler=sampler)
        assert plan.uses_uncond == (sampler == "euler_cfg_pp")
        uncond = plan.ranges("uncond", cond.zeroed()) if plan.uses_uncond else None
        return plan.guide(pipe.predict, plan.ranges("cond", cond), uncond)

    taken, plain = guide("euler_cfg_pp"), guide("euler")
    found = {}
    assert watched(pipe, lambda: found.update(taken=taken(x, 0.7), plain=plain(x, 0.7))) == [
        (None, ("uncond", "cond")),
        (None, ("cond",)),
    ]
    assert found["plain"].uncond is None
    assert tiny.error(found["taken"].uncond, found["plain"].x0) > 1e-4
    torch.testing.assert_close(found["taken"].x0, found["plain"].x0, rtol=0, atol=1e-12)


# ---- settings


@pytest.mark.parametrize(
    "how",
    [
        Guidance(),
        Guidance(kind="apg", momentum=-0.5, threshold=1e-3, interval=(0.1, 0.9)),
        Guidance(skip_guidance_layers=(9, 7, 8), skip_layer_guidance_stop=0.3, sequential=True, zero_init=2),
        Guidance(perturbed_layers=(2,), perturbed_interval=(0.25, 1.0), rescale=0.7),
    ],
)
def test_guidance_as_text(how):
    assert Guidance.from_text(how.to_text()) == how
    assert (how.to_text() == "") == (how == Guidance())
    assert how.skip_guidance_layers in ((), (7, 8, 9))


def test_settings_say_how_a_picture_was_guided(pipes):
    pipe, few = pipes["comfyui"], SMALL | {"num_inference_steps": 2, "output_type": "latent", "seed": 1}
    assert pipe("a", **few).settings[0].guidance == ""
    drawn = pipe("a", **SKIP, guidance=Guidance(zero_init=1), **few)
    said = drawn.settings[0].guidance
    assert said == (
        "zero_init=1 skip_guidance_layers=1 skip_layer_guidance_scale=3.0 skip_layer_guidance_start=0.01 "
        "skip_layer_guidance_stop=0.15"
    )
    assert torch.equal(pipe("a", guidance=Guidance.from_text(said), **few).images, drawn.images)


# ---- what is refused, before any model runs


@pytest.fixture
def silent(pipes, monkeypatch) -> Pipeline:
    """A pipeline none of whose models may run."""

    def ran(*_, **__):
        raise AssertionError("a model ran")

    pipe = pipes["diffusers"]
    for model in pipe.models.values():
        monkeypatch.setattr(model, "forward", ran)
    return pipe


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"skip_guidance_layers": [1, 3, 7]}, "skip_guidance_layers [3, 7] do not exist; this model has layers 0 to 2"),
        ({"skip_guidance_layers": [-1]}, "skip_guidance_layers[0] must be a whole number of at least 0, got -1"),
        ({"skip_layer_guidance_scale": 2.0}, "skip_layer_guidance_scale is given without skip_guidance_layers"),
        (
            SKIP | {"skip_layer_guidance_scale": float("nan")},
            "skip_layer_guidance_scale must be a finite number, got nan",
        ),
        (
            SKIP | {"skip_layer_guidance_stop": 1.5},
            "skip_layer_guidance_stop must be a finite number from 0 to 1, got 1.5",
        ),
        (
            SKIP | {"skip_layer_guidance_start": 0.5, "skip_layer_guidance_stop": 0.4},
            "skip_layer_guidance_start 0.5 is after skip_layer_guidance_stop 0.4",
        ),
        (SKIP | {"guidance": Guidance(skip_guidance_layers=(1,))}, "skip_guidance_layers is given, and in guidance"),
        ({"guidance": Guidance(perturbed_layers=(3,))}, "perturbed_layers [3] do not exist"),
        ({"guidance": Guidance(zero_init=6)}, "zero_init 6 leaves none of 6 steps"),
        (
            {"guidance": Guidance(kind="apg"), "guidance_scale": 1.0},
            "kind='apg' is about the unconditional pass, which profile 'diffusers' does not run at guidance_scale 1;",
        ),
        ({"guidance": Guidance(interval=(0.1, 0.9)), "guidance_scale": 0.5}, "interval=(0.1, 0.9) is about"),
        ({"guidance": Guidance(rescale=0.7), "guidance_scale": 1.0}, "rescale=0.7 is about"),
    ],
    ids=str,
)
def test_guidance_that_cannot_be(silent, settings, said):
    refuses(lambda: silent(PROMPTS[0], **(SMALL | settings)), said, error=ValueError)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "agp"}, "unknown guidance kind 'agp'; did you mean 'apg'"),
        ({"rescale": 1.1}, "guidance rescale must be a finite number from 0 to 1, got 1.1"),
        ({"threshold": -1.0}, "guidance threshold must be a finite number of at least 0"),
        ({"momentum": float("inf")}, "guidance momentum must be"),
        ({"interval": (0.9, 0.1)}, "guidance interval must be two noise levels 0 <= low < high <= 1, got (0.9, 0.1)"),
        ({"perturbed_interval": (0.5, 0.5)}, "guidance perturbed_interval must be two noise levels"),
        ({"zero_init": -1}, "guidance zero_init must be a whole number of at least 0"),
        (
            {"skip_layer_guidance_start": 0.5, "skip_layer_guidance_stop": 0.4},
            "skip_layer_guidance_start 0.5 is after skip_layer_guidance_stop 0.4",
        ),
    ],
    ids=str,
)
def test_settings_out_of_their_range(monkeypatch, settings, said):
    with pytest.raises(ValueError) as caught:
        Guidance.from_text(" ".join(f"{name}={_text(value)}" for name, value in settings.items()))
    assert said in str(caught.value)


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("momentun=1", "unknown guidance setting 'momentun'; did you mean 'momentum'"),
        ("zero_init", "guidance 'zero_init': expected zero_init=VALUE, once"),
        ("eta=1 eta=0", "guidance 'eta=0': expected eta=VALUE, once"),
        ("sequential=yes", "'yes' is no value of it"),
        ("perturbed_layers=1,b", "'1,b' is no value of it"),
    ],
)
def test_text_that_says_no_guidance(text, said):
    refuses(lambda: Guidance.from_text(text), said, error=ValueError)


def test_ranges_that_cannot_be(pipes, silent, monkeypatch):
    monkeypatch.undo()
    cond = pipes["diffusers"].encode("a")
    noise = silent.noise(1, height=32, width=48)
    monkeypatch.setattr(silent.transformer, "forward", lambda *_, **__: pytest.fail("a model ran"))
    parts = [Ranged(cond, 0.0, 0.2), Ranged(cond, 0.3, 1.0)]

    def sampled(one, other):
        return lambda: silent.sample(one, other, noise, guidance_scale=4.0)

    refuses(sampled(cond, parts), "uncond has no conditioning from sigma 0.923077 to 0.875", error=ValueError)
    refuses(sampled(parts[1:], cond), "cond has no conditioning from sigma 1 to 0.875", error=ValueError)
    refuses(sampled(cond, []), "uncond has no conditioning", error=ValueError)
    refuses(lambda: silent(cond, parts, **SMALL), "negative_prompt has no conditioning", error=ValueError)
    refuses(sampled(cond.repeat(2), cond), "cond holds 2 prompts for 1 pictures", error=ValueError)
    refuses(lambda: silent([*parts, "a"], **SMALL), "holds mmdit.Ranged and str; give Ranged alone", error=TypeError)
    refuses(lambda: Ranged(cond, 0.5, 0.5), "Ranged start 0.5 and stop 0.5", error=ValueError)


def test_one_range_may_stand_alone(pipes):
    pipe = pipes["diffusers"]
    how = {"seed": 1, "num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent"}
    cond = pipe.encode("a")
    drawn = [pipe(prompt, **how).images for prompt in (Ranged(cond), [Ranged(cond)], cond, "a")]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
