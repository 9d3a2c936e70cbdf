"""ControlNets in drawings: live against diffusers, with everything that a drawing can have, and what is refused."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from PIL import Image

import mmdit
import quant
import tiny
from mmdit import PROFILES, ControlNet, ControlNetConfig, Guidance, Hires, Pipeline, Ranged
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control import spread

MEAN = replace(PROFILES["diffusers"], control_latent="mean")
HINT = Image.fromarray((np.indices((40, 56)).sum(0)[..., None] * np.array([2, 1, 2]) % 256).astype(np.uint8))
SETTINGS = {"height": 32, "width": 48, "num_inference_steps": 2, "progress": False, "output_type": "latent"}


@pytest.fixture(scope="module")
def loaded():
    return Pipeline.demo(profile=MEAN)


@pytest.fixture
def pipe(loaded):
    yield loaded
    loaded.plain()
    loaded.profile, loaded.controlnet = MEAN, None


@pytest.fixture(scope="module")
def net():
    return tiny.randomize(ControlNet(ControlNetConfig(2, 256, 192, kind="canny")), 3).requires_grad_(False)


def draw(pipe, net, prompt="a red circle", **how):
    given = {} if net is None else {"controlnet": net, "control_image": HINT}
    return pipe(prompt, **{"seed": 1, **SETTINGS, **given, **how}).images


@pytest.mark.parametrize(
    ("joint", "how"),
    [
        (False, {}),
        (True, {"controlnet_conditioning_scale": 0.7, "control_guidance_start": 0.2, "control_guidance_end": 0.8}),
        (False, {"guidance_scale": 1.0}),
    ],
    ids=["8B", "joint, a part of the way", "without guidance"],
)
def test_live_against_diffusers(tiny_folders, tmp_path, joint, how):
    """Two pictures of two prompts; the noise of the hint is torch's global one on both sides."""
    folder = tiny_folders["sd3.5-large"]
    theirs_net = SD3ControlNetModel(
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=tiny.T5_WIDTH if joint else None,
        caption_projection_dim=128,
        pooled_projection_dim=tiny.CLIP_L + tiny.CLIP_G,
        pos_embed_max_size=tiny.SIDE,
        use_pos_embed=joint,
        pos_embed_type="sincos" if joint else None,
        force_zeros_for_pooled_projection=joint,
    )
    tiny.randomize(theirs_net, 5).save_pretrained(tmp_path)
    base = tiny.load(folder)
    theirs = StableDiffusion3ControlNetPipeline(**base.components, controlnet=theirs_net)
    theirs.set_progress_bar_config(disable=True)
    prompts, size = ["a red circle", "two stars"], {"height": 32, "width": 48, "num_inference_steps": 4}
    how = {"guidance_scale": 4.0, **size, **how, "output_type": "latent"}
    torch.manual_seed(11)
    wanted = theirs(
        prompts, negative_prompt=["", "blue"], control_image=HINT, generator=torch.Generator().manual_seed(3), **how
    ).images
    torch.manual_seed(11)
    found = Pipeline.from_pretrained(folder)(
        prompts, ["", "blue"], control_image=HINT, controlnet=mmdit.load_controlnet(tmp_path), seed=3, **how
    ).images
    assert tiny.error(found, wanted) <= 1e-5


WAYS = {
    "heun": {"sampler": "heun"},
    "CFG++": {"sampler": "euler_cfg_pp"},
    "apg": {"guidance": Guidance(kind="apg", rescale=0.5)},
    "one branch after the other": {"guidance": Guidance(sequential=True)},
    "a layer skipped": {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0},
    "perturbed attention": {"guidance": Guidance(perturbed_layers=(1,))},
    "another size": {"height": 48, "width": 32},
    "from a picture": {"image": HINT, "strength": 0.7},
    "a second pass": {"hires": Hires(scale=1.5, strength=0.5)},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_accelerated_and_with_every_guidance(pipe, net, how, monkeypatch):
    """The fast forward takes the residuals; the transformer's own runs for perturbed attention alone."""
    part = {"control_guidance_end": 0.7, **how}
    wanted = draw(pipe, net, **part)
    assert tiny.error(wanted, draw(pipe, None, **how)) > 1e-3, "the net acts"
    pipe.accelerate()
    own, passes = MMDiT.forward, []
    monkeypatch.setattr(MMDiT, "forward", lambda *args, **rest: passes.append(1) or own(*args, **rest))
    assert tiny.error(draw(pipe, net, **part), wanted) <= 1e-4
    assert bool(passes) == (how is WAYS["perturbed attention"])


def test_nothing_without_scale(pipe, net):
    plain = draw(pipe, None)
    assert torch.equal(draw(pipe, net, controlnet_conditioning_scale=0.0), plain)
    assert torch.equal(draw(pipe, net, control_guidance_start=0.1, control_guidance_end=0.6), plain), "no whole step"
    half = draw(pipe, [net, net], control_image=[HINT, HINT], controlnet_conditioning_scale=[0.5, 0.5])
    assert tiny.error(half, draw(pipe, net)) <= 1e-5


def test_several_pictures(pipe, net):
    """Each as if it were alone; with a hint for each, too."""
    other = Image.new("RGB", (48, 32), "white")
    both = draw(pipe, net, seed=[1, 2])
    for i, seed in enumerate((1, 2)):
        assert tiny.error(both[i : i + 1], draw(pipe, net, seed=seed)) <= 1e-5
    two = draw(pipe, net, seed=[1, 2], control_image=[HINT, other])
    assert tiny.error(two[:1], both[:1]) <= 1e-5
    assert tiny.error(two[1:], draw(pipe, net, seed=2, control_image=other)) <= 1e-5


def test_step_by_step(pipe, net):
    """`control` with `sample` is the same drawing; without an unconditional branch too."""
    control = pipe.control(net, HINT, height=32, width=48, scale=0.8)
    cond, uncond = (Ranged(pipe.encode(text), control=control) for text in ("a red circle", ""))
    noise = pipe.noise(1, height=32, width=48)
    *_, last = pipe.sample([cond], [uncond], noise, num_inference_steps=2)
    assert torch.equal(last.x, draw(pipe, net, controlnet_conditioning_scale=0.8))
    pipe.controlnet = net
    assert torch.equal(last.x, draw(pipe, None, control_image=HINT, controlnet_conditioning_scale=0.8))
    assert torch.equal(draw(pipe, None), draw(pipe, net, controlnet_conditioning_scale=0.0))


def test_the_pass_without_layers(pipe, net):
    """Stability's code leaves the net out of that pass, ComfyUI does not."""
    how = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with_net = draw(pipe, net, **how)
    pipe.profile = replace(MEAN, control_skip=False)
    assert tiny.error(draw(pipe, net, **how), with_net) > 1e-4


def test_a_net_in_float8(pipe, net):
    """The error of a step is that of float8; guidance and many steps would enlarge it."""
    rounded = copy.deepcopy(net)
    quant.quantize_(rounded, "fp8")
    how = {"num_inference_steps": 1, "guidance_scale": 1.0}
    assert 0 < tiny.error(draw(pipe, rounded, **how), draw(pipe, net, **how)) < 0.1


def test_offload_and_other_dtypes(pipe, net):
    """The net takes its turn with the transformer; it computes in its own dtype."""
    wanted = draw(pipe, net)
    turns = Pipeline.demo(profile=MEAN, offload="stages", device="cpu")
    assert torch.equal(draw(turns, net), wanted)
    assert 0 < tiny.error(draw(pipe, copy.deepcopy(net).bfloat16()), wanted) < 0.05


def test_capture_and_patch(pipe, net):
    """By step and branch, where the pipeline has the net; without its residuals, the drawing is the plain one."""
    pipe.controlnet = net
    assert {"controlnet.controlnet_blocks.1", "controlnet.transformer_blocks.0.attn.q"} <= set(mmdit.points(pipe).names)
    with mmdit.capture(pipe, "controlnet.controlnet_blocks.*", branch="cond", budget=None) as seen:
        wanted = draw(pipe, None, control_image=HINT, control_guidance_end=0.7)
    assert seen["controlnet.controlnet_blocks.1"].shape == (1, 1, 6, 256), "it acts in one of two steps"
    with mmdit.patch(pipe, "controlnet.controlnet_blocks.*", scale=0.0):
        found = draw(pipe, None, control_image=HINT)
    assert torch.equal(found, draw(pipe, None))
    assert not torch.equal(found, wanted)
    alone = mmdit.points(net)
    with mmdit.capture(net, alone.names, budget=None) as every:
        draw(pipe, net, num_inference_steps=1)
    assert set(every.keys()) == set(alone.names)


def test_settings(pipe, net):
    settings = pipe(
        "a red circle", seed=1, **SETTINGS | {"output_type": "pil"}, controlnet=net, control_image=HINT
    ).settings
    assert settings[0].control.startswith("canny:1:0:1:net=")
    assert mmdit.Settings.from_json(settings[0].to_json()) == settings[0]
    other = pipe(
        "a red circle", seed=1, **SETTINGS | {"output_type": "pil"}, controlnet=net, control_image=HINT.rotate(90)
    )
    assert other.settings[0].control != settings[0].control
    assert pipe("a red circle", seed=1, **SETTINGS | {"output_type": "pil"}).settings[0].control == ""


def of(**change):
    return ControlNet(ControlNetConfig(**{"depth": 1, "hidden_size": 256, "pooled_dim": 192, **change}))


INPAINT = {"context_dim": 256, "pos_embed_size": 16, "hint_channels": 17}
WRONG = [
    ({"controlnet": None}, ValueError, "controlnet"),
    ({"control_image": None}, ValueError, "control_image"),
    ({"controlnet": "net.safetensors"}, TypeError, "load_controlnet"),
    ({"controlnet": lambda: of(hidden_size=64)}, ValueError, "64.*256"),
    ({"controlnet": lambda: of(pooled_dim=64)}, ValueError, "64.*192"),
    ({"controlnet": lambda: of(context_dim=64, pos_embed_size=4)}, ValueError, "64.*256"),
    ({"controlnet": lambda: of(depth=9)}, ValueError, "9.*4"),
    ({"controlnet": lambda: [of(), of()]}, ValueError, "2 hints"),
    ({"controlnet": []}, ValueError, "empty"),
    ({"controlnet": lambda: [of(), of()], "control_image": [HINT]}, ValueError, "2 hints"),
    ({"control_image": [HINT, HINT]}, ValueError, "2 pictures for 1"),
    ({"control_image": "nowhere.png"}, FileNotFoundError, "nowhere"),
    ({"control_image": 3}, TypeError, "control_image"),
    ({"control_mask": HINT}, ValueError, "control_mask"),
    ({"controlnet": lambda: of(**INPAINT)}, ValueError, "control_mask"),
    ({"controlnet_conditioning_scale": float("nan")}, ValueError, "controlnet_conditioning_scale"),
    ({"controlnet_conditioning_scale": [1.0, 1.0]}, ValueError, "2 values for 1"),
    ({"control_guidance_start": 0.8, "control_guidance_end": 0.2}, ValueError, r"0\.8.*0\.2"),
    ({"control_guidance_end": 1.5}, ValueError, r"1\.5"),
    ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, ValueError, r"0\.5"),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(("change", "error", "words"), WRONG)
def test_what_is_refused(pipe, change, error, words, monkeypatch):
    """Before any model runs."""
    monkeypatch.setattr(pipe, "_encode", lambda *_, **__: pytest.fail("a model ran"))
    given = {"controlnet": of(), "control_image": HINT, **SETTINGS}
    given |= {name: value() if callable(value) else value for name, value in change.items()}
    with pytest.raises(error, match=words):
        pipe("a red circle", seed=1, **given)


def test_a_net_elsewhere(pipe):
    with pytest.raises(ValueError, match="meta"):
        draw(pipe, of().to("meta"))


@pytest.mark.parametrize("profile", ["diffusers", "comfyui"])
def test_where_residuals_go(profile):
    """Of 19 for 38 blocks, and of numbers that do not divide each other."""
    rules, joint = PROFILES[profile], {"context_dim": 8, "pos_embed_size": 2}
    sizes = {"hidden_size": 4, "pooled_dim": 4, "head_dim": 4}

    def places(count, depth, **more):
        with torch.device("meta"):
            return spread(rules, ControlNet(ControlNetConfig(count, **sizes, **more)), depth)

    last = [] if profile == "comfyui" else [None]
    assert places(19, 38) == ([i // 2 for i in range(38)] if not last else [*(i // 2 for i in range(37)), None])
    assert places(2, 5)[:4] == [0, 0, 0, 1]
    assert places(6, 24, **joint) == [*(i // 4 for i in range(23)), None]
    assert places(3, 8, **joint) == ([0, 0, 1, 1, 2, None, None, None] if not last else [0, 0, 0, 1, 1, 1, 2, None])
