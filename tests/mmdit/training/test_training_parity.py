"""Losses and gradients of adapters and of the whole transformer, against diffusers and peft in float64."""

import pytest
import torch

import tiny
from float64 import references_in_float64
from full import FULL
from mmdit import Pipeline, capture
from mmdit.checkpoints.keymaps import mmdit_rules
from mmdit.training.adapters import attach, detach
from mmdit.training.batches import Batch
from mmdit.training.blocks import keep_all, recompute
from mmdit.training.config import TrainingConfig
from mmdit.training.export import write_lora
from mmdit.training.loop import flow_losses
from samplers.training import WEIGHTINGS, noised

RANK, ALPHA = 4, 6.0
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj"]
TARGETS += ["attn.add_v_proj", "attn.to_add_out"]  # those of diffusers' training script
OURS = [f"joint_blocks.*.attn.{name}" for name in ("qkv", "proj")]


def batch() -> Batch:
    g = torch.Generator().manual_seed(7)
    shapes = [(2, 16, 4, 6), (2, 16, 4, 6), (2, 9, tiny.T5_WIDTH), (2, tiny.CLIP_L + tiny.CLIP_G)]
    x0, noise, context, pooled = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    return Batch(x0, noise, torch.tensor([0.31, 0.83], dtype=torch.float64), context, pooled)


def their_loss(model, one: Batch, weighting: str):
    """As in diffusers' train_dreambooth_lora_sd3.py, in float64."""
    noisy = noised(one.x0, one.noise, one.t)
    predicted = model(noisy, one.context, one.pooled, 1000 * one.t, return_dict=False)[0]
    weight = WEIGHTINGS[weighting](one.t)[:, None, None, None]
    return torch.mean((weight * (predicted - (one.noise - one.x0)) ** 2).reshape(2, -1), 1).mean()


@pytest.fixture(autouse=True, scope="module")
def wide():
    with references_in_float64():
        yield


@pytest.fixture(scope="module")
def folder(tiny_folders):
    return tiny_folders["sd3.5-medium"]


def pair(folder):
    pipe = Pipeline.from_pretrained(folder, dtype=torch.float64)
    theirs = tiny.transformer(tiny.VARIANTS["sd3.5-medium"]).double()
    return pipe.transformer, theirs


def theirs_of(model, name: str, key: str) -> torch.Tensor:
    return model.get_submodule(name).get_submodule(key)["default"].weight


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters(dora, folder):
    from peft import LoraConfig  # not at the top: where torchao is installed, its import warns

    ours, theirs = pair(folder)
    settings = {"adapter": "dora" if dora else "lora", "rank": RANK, "alpha": ALPHA, "targets": OURS}
    adapters = attach(ours, TrainingConfig.from_json(settings | {"dtype": "float64"}))
    theirs.requires_grad_(False)
    theirs.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=dora, target_modules=TARGETS))
    names = {rule.ours.removesuffix(".weight"): rule.theirs for rule in mmdit_rules(tiny.DEPTH)}
    modules = {name: [key.removesuffix(".weight") for key in names[name]] for name in adapters}
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, adapter in adapters.items():
            adapter.up.copy_(0.1 * torch.randn(adapter.up.shape, generator=g))
            for part, module in enumerate(modules[name]):
                theirs_of(theirs, module, "lora_A").copy_(adapter.down.chunk(adapter.parts)[part])
                theirs_of(theirs, module, "lora_B").copy_(adapter.up[part])
    for weighting in WEIGHTINGS if FULL or not dora else ("cosmap",):
        theirs.zero_grad()
        ours.zero_grad()
        found = flow_losses(ours, batch(), WEIGHTINGS[weighting]).mean()
        wanted = their_loss(theirs, batch(), weighting)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        found.backward()
        wanted.backward()
        for name, adapter in adapters.items():
            for part, module in enumerate(modules[name]):
                downs = adapter.down.grad.chunk(adapter.parts)[part], theirs_of(theirs, module, "lora_A").grad
                ups = adapter.up.grad[part], theirs_of(theirs, module, "lora_B").grad
                torch.testing.assert_close(*downs, rtol=1e-6, atol=1e-9, msg=f"{module} down")
                torch.testing.assert_close(*ups, rtol=1e-6, atol=1e-9, msg=f"{module} up")
                if dora:
                    norms = theirs_of(theirs, module, "lora_magnitude_vector").grad
                    mine = adapter.norms.grad.chunk(adapter.parts)[part]
                    torch.testing.assert_close(mine, norms, rtol=1e-6, atol=1e-9, msg=f"{module} norms")


def test_the_whole_transformer(folder):
    ours, theirs = pair(folder)
    found = flow_losses(ours.requires_grad_(True), batch()).mean()
    wanted = their_loss(theirs, batch(), "none")
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    found.backward()
    wanted.backward()
    rules = [rule for rule in mmdit_rules(tiny.DEPTH) if rule.ours in dict(ours.named_parameters())]
    assert len(rules) > 50
    for rule in rules:
        grads = [theirs.get_parameter(key).grad for key in rule.theirs]
        mine = dict(ours.named_parameters())[rule.ours].grad
        torch.testing.assert_close(rule.merge(*grads), mine, rtol=1e-6, atol=1e-9, msg=rule.ours)


@pytest.mark.parametrize("keep_attention", [False, True] if FULL else [True])
def test_blocks_that_compute_again_give_the_same_gradients(keep_attention, folder):
    ours, _ = pair(folder)
    adapters = attach(ours, TrainingConfig.from_json({"rank": RANK, "targets": OURS, "dtype": "float64"}))
    parameters = [one for adapter in adapters.values() for one in adapter.parameters()]
    wanted = torch.autograd.grad(flow_losses(ours, batch()).mean(), parameters)
    kept: list[int] = []
    recompute(ours.joint_blocks, keep_attention=keep_attention)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.nbytes) or one, lambda one: one):
        loss = flow_losses(ours, batch()).mean()
    found = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, found, wanted))
    keep_all(ours.joint_blocks)
    plain: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: plain.append(one.nbytes) or one, lambda one: one):
        flow_losses(ours, batch())
    assert sum(kept) < 0.4 * sum(plain)


@pytest.mark.parametrize("kind", ["lora", "dora"] if FULL else ["dora"])
def test_diffusers_draws_with_a_trained_adapter(kind, folder, tmp_path):
    """A file that training wrote, read by diffusers and peft: the same picture as the model that was trained."""
    ours, theirs = Pipeline.from_pretrained(folder), tiny.load(folder)
    settings = {"adapter": kind, "rank": RANK, "alpha": ALPHA, "targets": [*OURS, "joint_blocks.1.*.mlp.fc1"]}
    config = TrainingConfig.from_json(settings | {"dtype": "float32"})
    adapters = attach(ours.transformer, config)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.up.copy_(0.1 * torch.randn(adapter.up.shape, generator=torch.Generator().manual_seed(1)))
    how = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent", "guidance_scale": 4.0}

    def drawn(pipe) -> torch.Tensor:
        return pipe("a red circle", generator=torch.Generator().manual_seed(3), **how).images

    plain, wanted = drawn(theirs), drawn(ours)
    theirs.load_lora_weights(write_lora(adapters, tmp_path / "lora.safetensors", config))
    assert tiny.error(drawn(theirs), wanted) < 2e-5
    assert tiny.error(plain, wanted) > 1e-2


@pytest.mark.parametrize("again", [False, True] if FULL else [True])
def test_a_capture_sees_the_forward_pass_of_a_step(again, folder):
    """Not the blocks that compute again in the backward pass."""
    pipe = Pipeline.from_pretrained(folder)
    adapters = attach(pipe.transformer, TrainingConfig.from_json({"rank": RANK, "targets": OURS, "dtype": "float32"}))
    one, up = Batch(*(part.float() for part in batch()[:5])), next(iter(adapters.values())).up
    plain = torch.autograd.grad(flow_losses(pipe.transformer, one).mean(), up)[0]
    if again:
        recompute(pipe.transformer.joint_blocks, keep_attention=True)
    points = ["joint_blocks.*.x_block.mlp.pre", "joint_blocks.1.x_block.resid_post"]
    with capture(pipe.transformer, points) as seen:
        found = torch.autograd.grad(flow_losses(pipe.transformer, one).mean(), up)[0]
    assert {tuple(torch.as_tensor(seen[point]).shape[:2]) for point in seen} == {(1, 2)}
    assert len(list(seen)) == tiny.DEPTH + 1
    assert torch.equal(found, plain)


def test_adapters_and_loras_do_not_take_each_others_place(folder, tmp_path):
    """They did without a word, so that a training went on without its adapters, or without the LoRA that it was for."""
    pipe = Pipeline.from_pretrained(folder)
    config = TrainingConfig.from_json({"rank": RANK, "targets": OURS, "dtype": "float32"})
    adapters = attach(pipe.transformer, config)
    file = write_lora(adapters, tmp_path / "lora.safetensors", config)

    def disabled() -> None:
        with pipe.without_lora():
            pass

    for change in (
        lambda: attach(pipe.transformer, config),
        lambda: pipe.load_lora_weights(file, "trained"),
        pipe.unload_lora_weights,
        disabled,
        lambda: pipe.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(ValueError, match="detach"):
            change()
        assert all(pipe.transformer.get_submodule(name).adapter is one for name, one in adapters.items())
    assert not pipe.get_active_adapters()
    assert not (tmp_path / "saved").exists()
    detach(pipe.transformer, adapters)
    pipe.load_lora_weights(file, "trained")
    with pytest.raises(ValueError, match="fuse_lora"):
        attach(pipe.transformer, config)
    pipe.fuse_lora()
    assert attach(pipe.transformer, config).keys() == adapters.keys()
