"""ControlNets by the fast kernels: their own residuals, inside of accelerated steps; every change is noticed."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmdit.models.config import MMDiTConfig
from mmdit.models.controlnet import ControlNet, ControlNetConfig, made_pos_embed
from mmdit.models.mmdit import MMDiT
from mmdit.runtime import plain_kernels
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.attention import torch_attention
from mmdit.runtime.compiled import ACCELERATED, refuse_compiled
from mmdit.runtime.fast_control import FastControlNet, summed
from mmdit.runtime.fast_nets import ActingNet, FastNets
from mmdit.runtime.graphs import Graphs
from quant.quantize import linears_of, quantize_
from quant.recipe import as_recipe
from skips import SKIPS
from triton_device import DEVICE, HAS_TRITON, quiet

GPU = DEVICE == "cuda"
CONFIG = MMDiTConfig(3, 64, 48, 24, 8, head_dim=16, in_channels=4, out_channels=4)
SIZES = {"depth": 2, "hidden_size": 64, "pooled_dim": 24, "head_dim": 16, "in_channels": 4, "hint_channels": 4}
JOINT = {"context_dim": 48, "pos_embed_size": 8}
CONFIGS = {
    "single": ControlNetConfig(**SIZES),
    "single, normed": ControlNetConfig(**SIZES, qk_norm="rms"),
    "joint": ControlNetConfig(**SIZES, **JOINT),
    "joint, normed": ControlNetConfig(**SIZES, **JOINT, qk_norm="rms"),
}


@torch.no_grad()
def drawn(model, dtype):
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.1)
        if name.endswith(("ln_q.weight", "ln_k.weight")):
            parameter.add_(1)
    return model.to(DEVICE, dtype).eval().requires_grad_(False)


def net_of(name, dtype=torch.float64):
    return drawn(ControlNet(CONFIGS[name]), dtype)


def inputs_of(samples=2, dtype=torch.float64, cells=(6, 8)):
    """latent, timestep, context, pooled, hint, tokens."""
    latent = samples, 4, *cells
    shapes = latent, (samples, 5, 48), (samples, 24), latent, (samples, cells[0] * cells[1] // 4, 64)
    latent, context, pooled, hint, tokens = (torch.randn(shape).to(DEVICE, dtype) for shape in shapes)
    return latent, torch.rand(samples, device=DEVICE) * 1000, context, pooled, hint, tokens


def fast_of(net, inputs, *, kernels=plain_kernels, scale=1.0):
    latent, timestep, context, pooled, hint, tokens = inputs
    fast = FastControlNet(net, kernels=kernels, attention=torch_attention)
    vectors = torch.cat([fast.table(timestep[i : i + 1], pooled[i : i + 1])[0] for i in range(len(latent))])
    tokens = None if net.config.is_joint else tokens
    return torch.stack(fast(latent, tokens, fast.tokens(context), net.pos_embed_input(hint), vectors, scale))


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def quantized(net, recipe):
    scales = {name: torch.tensor(0.02) for name, _ in linears_of(net)}
    return quantize_(net, recipe, input_scales=scales if as_recipe(recipe).activation == "static" else None)


def test_each_thread_has_timesteps_of_its_own_drawing():
    nets = FastNets(MMDiT(CONFIG), torch_attention, Graphs())
    nets.begin([900.0, 600.0])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(nets.begin, [300.0]).result()
        assert nets._planned_in(torch.bfloat16) == (900.0, 600.0)
        assert pool.submit(nets._planned_in, torch.bfloat16).result() == (300.0,)
        pool.submit(nets.begin).result()
    assert nets._planned_in(torch.bfloat16) == (900.0, 600.0)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_net(name, samples):
    net, inputs = net_of(name), inputs_of(samples)
    before = [one.clone() for one in inputs]
    wanted = torch.stack(net(*inputs))
    assert error(fast_of(net, inputs), wanted) < 1e-12
    assert error(fast_of(net, inputs, scale=-0.5), -0.5 * wanted) < 1e-12
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("recipe", ["fp8", "fp8-static", "fp8-tensor", "fp8-weight-only"])
@pytest.mark.parametrize("name", ["single", "joint, normed"])
def test_in_float8_it_has_the_same_codes(name, recipe):
    """In float64, where the last bit of no value decides between two codes."""
    net, inputs = net_of(name), inputs_of()
    quantized(net, recipe)
    assert error(fast_of(net, inputs), torch.stack(net(*inputs))) < 1e-12


@pytest.mark.parametrize("recipe", [None, "fp8", "fp8-static"] if GPU else ["fp8"])
@pytest.mark.parametrize("name", CONFIGS if GPU else ["single"])
@pytest.mark.skipif(not HAS_TRITON, reason=SKIPS["triton"])
def test_by_triton_it_is_as_exact_as_the_net(name, recipe):
    from mmdit.runtime import kernels

    exact, inputs = net_of(name), inputs_of(8) if GPU else inputs_of(1, cells=(4, 4))
    net = ControlNet(CONFIGS[name]).to(DEVICE, torch.float64)
    net.load_state_dict(exact.state_dict())
    net = net.to(torch.bfloat16).requires_grad_(False)
    wanted = torch.stack(exact(*inputs))
    if recipe is not None:
        quantized(net, recipe)
    low = [one if i == 1 else one.bfloat16() for i, one in enumerate(inputs)]
    with quiet():
        found = error(fast_of(net, low, kernels=kernels), wanted)
    assert found < 1.3 * error(torch.stack(net(*low)), wanted)


def test_several_nets_are_summed():
    one, two, three = (torch.full((1,), float(value)) for value in (1, 2, 3))
    found = summed([[one, two], [three]], [[0, 1, 1, None], [0, None, 0, None]])
    assert [None if value is None else float(value) for value in found] == [4, 2, 5, None]


# In accelerated steps ------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return drawn(MMDiT(CONFIG), torch.bfloat16 if GPU else torch.float32)


def acting(model, name="single", net=None, **how):
    """A net with hints of two branches."""
    dtype = model.pos_embed.dtype
    net = net_of(name, dtype) if net is None else net
    hints = tuple(torch.randn(1, 4, 6, 8).to(DEVICE, dtype) for _ in range(2))
    return ActingNet(net, hints, 500.0, how.pop("scale", 0.7), how.pop("places", (0, 0, 1)), **how)


def texts_of(model):
    return [[torch.randn(shape).to(DEVICE, model.pos_embed.dtype) for _ in range(2)] for shape in ((1, 5, 48), (1, 24))]


def velocity(fast, latent, texts, *nets, timestep=500.0):
    return fast.velocity(latent, timestep, *texts, nets=nets)


def own(model, latent, texts, *nets, timestep=500.0):
    """By the models' own forwards."""
    context, pooled = (torch.cat(one) for one in texts)
    given = []
    for one in nets:
        level = torch.full((2,), one.timestep, device=DEVICE)
        made = made_pos_embed(64, 3, 4, DEVICE).to(latent.dtype) if one.makes_positions else None
        tokens = model.x_embedder(latent) + (model.cropped_pos_embed(6, 8) if made is None else made)
        vector = torch.zeros_like(pooled) if one.zeroes_pooled else pooled
        level = level.to(latent.dtype).float() if one.rounds_timestep else level
        found = one.net(latent, level, context, vector, torch.cat(one.hints), tokens)
        given.append([one.scale * residual for residual in found])
    control = summed(given, [one.places for one in nets]) if nets else None
    return model(latent, torch.full((2,), timestep, device=DEVICE), context, pooled, control=control)


def exact_of(model, latent, texts, one):
    """`own` in float64."""
    net, hints = deepcopy(one.net).double(), tuple(hint.double() for hint in one.hints)
    wide = [[part.double() for part in parts] for parts in texts]
    return own(deepcopy(model).double(), latent.double(), wide, replace(one, net=net, hints=hints))


def near(found, wanted):
    return error(found, wanted.double()) < (0.03 if GPU else 1e-5)


def latent_of(model):
    return torch.randn(2, 4, 6, 8).to(DEVICE, model.pos_embed.dtype)


@pytest.mark.parametrize("name", ["single", "joint"])
def test_steps_with_nets(model, name):
    fast, latent, texts = Accelerated(model), latent_of(model), texts_of(model)
    one = acting(model, name)
    other = acting(model, "joint", zeroes_pooled=True, scale=1.0, places=(1, None, 0), rounds_timestep=True)
    plain = velocity(fast, latent, texts)
    for nets in ((one,), (one, other), (acting(model, "single", makes_positions=True),), ()):
        found = velocity(fast, latent, texts, *nets)
        assert near(found, own(model, latent, texts, *nets))
        assert torch.equal(found, plain) == (not nets)
    names = [layer.name for layer in fast.report().controlnets]
    assert f"controlnet.transformer_blocks.1.{'x_block.' if name == 'joint' else ''}mlp.fc1" in names
    assert "controlnet.controlnet_blocks.0" in names
    assert "ControlNets" in str(fast.report())


def test_tables_and_hints_are_computed_once_in_a_drawing(model, monkeypatch):
    fast, latent, texts, one = Accelerated(model), latent_of(model), texts_of(model), acting(model)
    tables, hints, table, embedded = [], [], FastControlNet.table, FastNets._embedded
    monkeypatch.setattr(
        FastControlNet, "table", lambda self, t, pooled: tables.append(t.tolist()) or table(self, t, pooled)
    )
    monkeypatch.setattr(FastNets, "_embedded", lambda self, *given: hints.append(1) or embedded(self, *given))
    for drawing in (1, 2):
        for step in fast.drawing([900.0, 500.0, 100.0], [900.0, 500.0, 100.0], [899.0, 499.0, 99.0]):
            now = ActingNet(one.net, one.hints, step - 1, one.scale, one.places)
            assert near(
                velocity(fast, latent, texts, now, timestep=step), own(model, latent, texts, now, timestep=step)
            )
        assert tables == [[899.0, 499.0, 99.0]] * drawing
        assert len(hints) == drawing


CHANGES = {
    "in place": lambda net: net.transformer_blocks[1].mlp.fc1.weight.mul_(3),
    "a projection": lambda net: net.controlnet_blocks[0].weight.mul_(3),
    "modulation": lambda net: net.transformer_blocks[0].adaLN_modulation[1].bias.add_(1),
    "the hint's embedder": lambda net: net.pos_embed_input.proj.weight.mul_(3),
    "a parameter": lambda net: setattr(
        net.controlnet_blocks[1], "weight", nn.Parameter(2 * net.controlnet_blocks[1].weight, requires_grad=False)
    ),
    "float8": lambda net: quantize_(net, "fp8"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_net_is_noticed_at_the_next_drawing(model, change):
    fast, latent, texts, one = Accelerated(model), latent_of(model), texts_of(model), acting(model)
    (before,) = (velocity(fast, latent, texts, one) for _ in fast.drawing([0], [500.0], [500.0]))
    exact = exact_of(model, latent, texts, one)
    with torch.no_grad():
        CHANGES[change](one.net)
    (found,) = (velocity(fast, latent, texts, one) for _ in fast.drawing([0], [500.0], [500.0]))
    assert not torch.equal(before, found)
    wanted = own(model, latent, texts, one)
    if GPU and change == "float8":  # activations that differ in their last bits become neighbouring codes
        assert error(found, exact) == pytest.approx(error(wanted, exact), rel=0.15)
    else:
        assert near(found, wanted)


REFUSED = {
    "hooked": lambda net: net.transformer_blocks[1].mlp.register_forward_hook(lambda *_: None),
    "replaced": lambda net: setattr(net.transformer_blocks[1], "attend", nn.Identity()),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_it_would_not_run_is_refused(model, change):
    fast, one = Accelerated(model), acting(model)
    REFUSED[change](one.net)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1"):
        velocity(fast, latent_of(model), texts_of(model), one)


def test_nobody_looks_into_a_net_that_has_acted(model):
    fast, one = Accelerated(model), acting(model)
    refuse_compiled(one.net, "the net")
    velocity(fast, latent_of(model), texts_of(model), one)
    with pytest.raises(ValueError, match=r"pipe\.plain\(\)"):
        refuse_compiled(one.net, "the net")
    fast.close()
    refuse_compiled(one.net, "the net")
    assert not ACCELERATED.get(one.net)


def test_a_net_that_does_not_fit_and_two_kinds_of_residuals(model):
    fast, latent, texts, one = Accelerated(model), latent_of(model), texts_of(model), acting(model)
    wide = ActingNet(one.net, (torch.randn(2, 5, 6, 8, device=DEVICE),), 500.0, 1.0, (0, 0, 1))
    with pytest.raises(ValueError, match=r"hint channels.*5.*4"):
        velocity(fast, latent, texts, wide)
    with pytest.raises(ValueError, match="control and nets"):
        fast.velocity(latent, 500.0, *texts, nets=[one], control=[None] * 3)


def test_a_net_that_nobody_needs_is_freed(model):
    fast, one = Accelerated(model), acting(model)
    for _ in fast.drawing([0], [500.0], [500.0]):
        velocity(fast, latent_of(model), texts_of(model), one)
    net, cleared = weakref.ref(one.net), []
    fast.graphs.clear = lambda: cleared.append(1)
    del one
    gc.collect()
    assert net() is None
    fast.begin()
    assert cleared == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason=SKIPS["gpu"])
@pytest.mark.parametrize("recipe", [None, "fp8"])
@pytest.mark.parametrize("name", ["single", "joint"])
def test_graphs_with_nets_are_bit_equal_and_notice_changes(model, name, recipe):
    net = net_of(name, torch.bfloat16)
    if recipe is not None:
        quantize_(net, recipe)
    fast, latent, texts = Accelerated(model), latent_of(model), texts_of(model)
    plain, seen, one = fast.without_graphs(), [], acting(model, net=net)
    for change in ("nothing", "a hint", "a scale", "places", "a weight"):
        if change == "a weight":
            net.pos_embed_input.proj.weight.mul_(-1)
        hints = acting(model, net=net).hints if change == "a hint" else one.hints
        scale, places = 0.2 if change == "a scale" else one.scale, (1, None, 0) if change == "places" else one.places
        now = ActingNet(net, hints, 500.0, scale, places)
        found = velocity(fast, latent, texts, now)
        assert torch.equal(found, velocity(plain, latent, texts, now))
        assert recipe is not None or near(found, own(model, latent, texts, now))
        assert not any(torch.equal(found, other) for other in seen)
        seen.append(found)
    assert len(fast.graphs) == 1  # a changed weight forgets the others
