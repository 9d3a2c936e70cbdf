"""Weights that visit a device: nothing is lost, nothing stays, and streamed blocks are where they should be."""

import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import quant
from device_double import LiveBytes
from inspected import inputs, model
from mmdit import Pipeline
from mmdit.bench.memory import host_bytes
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.arguments import checked_offload
from mmdit.runtime import host_memory, streaming
from mmdit.runtime.host_memory import Layout, give_back
from mmdit.runtime.streaming import WHOLE, Presence, Residency, model_bytes, tensors_of
from skips import SKIPS


def addresses(*models):
    return [tensor.data_ptr() for one in models for tensor in (*one.parameters(), *one.buffers())]


def test_one_group_at_a_time():
    one, two, turns = nn.Linear(2, 2), nn.BatchNorm1d(3), Residency("cpu", moves=True)
    turns.enter({one: WHOLE})
    homes = addresses(one, two)
    turns.enter({one: WHOLE})
    assert addresses(one, two) == homes, "it was there already"
    turns.enter({two: WHOLE})
    assert all(a != b for a, b in zip(addresses(two), homes[2:], strict=True))
    turns.leave()
    at_home = addresses(one, two)
    assert set(at_home).isdisjoint(homes[:2])
    turns.enter({one: WHOLE, two: WHOLE})
    turns.leave()
    assert addresses(one, two) == at_home


def test_what_was_changed_on_the_device_is_brought_home():
    linear, turns = nn.Linear(2, 2), Residency("cpu", moves=True)
    turns.enter({linear: WHOLE})
    with torch.no_grad():
        linear.weight.fill_(3.0)
    turns.leave()
    assert torch.equal(linear.weight, torch.full((2, 2), 3.0))


def test_replaced_and_changed_tensors_travel(small):
    """A LoRA's new tensors, or another dtype, between two visits."""
    turns, given = Residency("cpu", moves=True), inputs()
    turns.enter({small: WHOLE})
    turns.leave()
    with torch.no_grad():
        small.joint_blocks[0].x_block.mlp.fc1.weight *= 2
        small.joint_blocks[1].x_block.mlp.fc1.weight = nn.Parameter(small.joint_blocks[1].x_block.mlp.fc1.weight * 2)
        wanted = small(*given)
        turns.enter({small: Presence(streamed=(0, 1, 2))})
        assert torch.equal(small(*given), wanted)


@pytest.fixture
def small():
    return model().requires_grad_(False)


@pytest.mark.parametrize("recipe", [None, "fp8", "fp8-tensor"])
@pytest.mark.parametrize("streamed", [(0, 1, 2), (0, 2), (1,)])
@torch.no_grad()
def test_streamed_blocks_compute_the_same(small, recipe, streamed):
    if recipe:
        quant.quantize_(small, recipe)
    given = inputs()
    wanted, skipping = small(*given), small(*given, skip_layers=(1,))
    before = {key: value.clone() for key, value in small.state_dict().items()}
    turns = Residency("cpu", moves=True)
    turns.enter({small: Presence(streamed=streamed)})
    for _ in range(2):
        assert torch.equal(small(*given), wanted)
        assert torch.equal(small(*given, skip_layers=(1,)), skipping)
    turns.rest()
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items()), "read between two steps"
    turns.enter({small: Presence(streamed=streamed)})
    assert torch.equal(small(*given), wanted)
    turns.leave()
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert not any(module._forward_pre_hooks for module in small.modules())


@torch.no_grad()
def test_a_block_that_is_changed_between_steps_is_streamed_anew(small):
    given, turns, presence = inputs(), Residency("cpu", moves=True), Presence(streamed=(0, 1, 2))
    turns.enter({small: presence})
    plain = small(*given)
    turns.rest()
    for i in range(3):
        small.joint_blocks[i].x_block.mlp.fc2.weight.mul_(1.5)
    turns.enter({small: presence})
    changed = small(*given)
    turns.leave()
    assert torch.equal(changed, small(*given))
    assert not torch.equal(changed, plain)


@torch.no_grad()
def test_only_two_slots_are_on_the_device(small):
    """Counted: the resident part, two blocks, and what the step computes."""
    given, sizes = inputs(), model_bytes(small)
    turns, whole = Residency("cpu", moves=True), Residency("cpu", moves=True)
    turns.enter({small: WHOLE})
    turns.leave()
    with LiveBytes() as live:
        small(*given)
    activations = live.peak
    with LiveBytes() as live:
        turns.enter({small: Presence(streamed=(0, 1, 2))})
        held = live.live
        small(*given)
        small(*given)
        assert live.peak <= held + activations
        turns.leave()
        assert live.live == 0
    rest = sizes.rest + sum(sizes.modulation) + 2 * max(sizes.blocks)
    assert rest <= held <= rest + 256 * len(list(small.parameters()))
    assert whole.moved == 0


def test_parts_of_a_model(small):
    parts = tensors_of(small)
    assert sorted(key for key in parts if key[0] == "block") == [("block", i) for i in range(3)]
    names = [name for name, _ in parts["block", 1]]
    assert "joint_blocks.1.x_block.mlp.fc1.weight" in names
    assert not any(name.endswith((".bias", "ln_q.weight")) or "adaLN" in name for name in names)
    every = [name for named in parts.values() for name, _ in named]
    assert sorted(every) == sorted(name for name, _ in (*small.named_parameters(), *small.named_buffers()))
    assert model_bytes(small).total == sum(t.nbytes for t in (*small.parameters(), *small.buffers()))


@torch.no_grad()
def test_what_two_modules_share_is_there_with_both(small):
    """A matrix of two blocks, one of a block and its adaLN, and one that is read outside of all blocks."""
    first, second, third = (block.x_block for block in small.joint_blocks)
    third.mlp.fc1.weight = first.mlp.fc1.weight
    small.joint_blocks[1].context_block.mlp.fc1 = second.mlp.fc1
    small.register_buffer("copy", second.attn.proj.weight)
    shared = [one.weight for one in (first.mlp.fc1, second.mlp.fc1, second.attn.proj)]
    parts = tensors_of(small)
    assert {id(one) for one in shared} <= {id(tensor) for _, tensor in parts["rest"]}
    names = [name for key, named in parts.items() if key != "rest" for name, _ in named]
    assert "joint_blocks.1.x_block.mlp.fc2.weight" in names
    assert not any(name.endswith(("0.x_block.mlp.fc1.weight", "1.x_block.attn.proj.weight")) for name in names)
    turns, given = Residency("cpu", moves=True), inputs()
    wanted = small(*given)
    turns.enter({small: Presence(streamed=(0, 1, 2))})
    assert torch.equal(small(*given), wanted)


def test_memory_keeps_shapes_strides_and_parts():
    weight = quant.Float8Tensor.quantize(torch.randn(6, 8), recipe="fp8")
    weight.snr = 30.0
    weight.prepared = object()  # it would keep the memory of the weight
    tensors = [torch.randn(3, 5).t(), torch.tensor(2.0), torch.zeros(0, 4), torch.randn(4).expand(3, 4), weight]
    layout = Layout(tensors)
    memory = host_memory.host_memory(layout.size)
    placed = layout.placed(tensors, memory)
    for one, other in zip(placed, tensors, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
    assert placed[0].stride() == tensors[0].stride()
    assert placed[4].snr == 30.0
    assert placed[4].prepared is None
    assert placed[4].recipe == weight.recipe
    assert layout.size < 256 * 8


def test_weights_that_get_memory_of_their_own_are_there_twice_one_by_one(monkeypatch):
    """Each is freed before the next one is copied, and all before the whole is pinned, which takes all its pages."""
    tensors = [torch.randn(2**18) for _ in range(6)]
    wanted = [tensor.clone() for tensor in tensors]
    before, alive, pinned = [weakref.ref(tensor.untyped_storage()) for tensor in tensors], [], []

    def count(into, source):
        alive.append(sum(one() is not None for one in before))
        host_memory.copy_parts(into, source)

    def pin(pages, memory):
        pinned.append((len(memory), sum(one() is not None for one in before)))

    monkeypatch.setattr(streaming, "copy_parts", count)
    monkeypatch.setattr(host_memory, "_pin", pin)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    unit = streaming.Unit(tensors, torch.device("cuda"))
    assert alive == [6, 5, 4, 3, 2, 1]
    assert pinned == [(len(unit.memory), 0)]
    assert all(torch.equal(one, other) for one, other in zip(unit.tensors, wanted, strict=True))


def test_an_interrupt_at_any_line_leaves_nothing(small):
    """An error out of the n-th operation while weights move, for every n."""
    given = inputs()
    with torch.no_grad():
        wanted = small(*given)
    turns = Residency("cpu", moves=True)
    turns.enter({small: WHOLE})
    turns.leave()
    homes, presence = addresses(small), {small: Presence(streamed=(0, 1, 2), adaln=False)}
    with LiveBytes() as live:
        turns.enter(presence)
    turns.leave()
    for n in range(1, live.operations + 1, 7):
        with pytest.raises(torch.OutOfMemoryError), LiveBytes(fails=lambda i, n=n: i == n):
            turns.enter(presence)
        turns.leave()
        assert addresses(small) == homes
        assert not any(module._forward_pre_hooks for module in small.modules())
    with torch.no_grad():
        assert torch.equal(small(*given), wanted)


@torch.no_grad()
def test_compiled_blocks_are_not_streamed(small):
    """A compiled module runs no hooks: where it stays, it is waited for at once."""
    given, turns = inputs(), Residency("cpu", moves=True)
    wanted = small(*given)
    small.joint_blocks[1]._compiled_call_impl = small.joint_blocks[1]._call_impl
    turns.enter({small: WHOLE})
    assert torch.equal(small(*given), wanted)
    assert not small.joint_blocks[1]._forward_pre_hooks
    with pytest.raises(ValueError, match="block 1 of MMDiT is compiled"):
        turns.enter({small: Presence(streamed=(0, 1, 2))})
    turns.leave()
    assert torch.equal(small(*given), wanted)


TEXT = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
SETTINGS = {
    "num_inference_steps": 2,
    "height": 32,
    "width": 32,
    "output_type": "pt",
    "seed": 1,
    "max_sequence_length": 32,
}


def test_loras_of_models_that_take_turns(tiny_folders):
    """Attached and merged while the transformer is on the device; unloading brings the old bits back."""
    whole, pipe = (Pipeline.from_pretrained(tiny_folders["sd3.5-large"], offload=one) for one in (None, "stages"))
    pipe._turns.moves = True
    tensors = {}
    for i, (key, width) in enumerate((("transformer.transformer_blocks.1.attn.to_q", 128), (TEXT, 64))):
        for factor, shape in (("A", (2, width)), ("B", (width, 2))):
            generator = torch.Generator().manual_seed(i)
            tensors[f"{key}.lora_{factor}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    plain = pipe("a red circle", **SETTINGS).images
    before = {key: tensor.clone() for key, tensor in pipe.transformer.state_dict().items()}
    for change in (
        lambda one: one.load_lora_weights(tensors, "one", 0.7),
        lambda one: one.fuse_lora(),
        lambda one: one.set_adapters("one", -0.4),
        lambda one: one.unfuse_lora(),
    ):
        for one in (whole, pipe):
            change(one)
        drawn = pipe("a red circle", **SETTINGS).images
        assert torch.equal(drawn, whole("a red circle", **SETTINGS).images)
        assert not torch.equal(drawn, plain)
    pipe.unload_lora_weights()
    assert all(torch.equal(tensor, before[key]) for key, tensor in pipe.transformer.state_dict().items())
    assert torch.equal(pipe("a red circle", **SETTINGS).images, plain)


@pytest.mark.parametrize("offload", [None, "stages"])
def test_a_stopped_drawing_leaves_a_pipeline_that_draws_the_same(tiny_folders, offload):
    pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-large"], offload=offload)
    if offload:
        pipe._turns.moves = True
    wanted = pipe("a red circle", **SETTINGS).images
    homes = addresses(*pipe.models.values())

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a red circle", callback_on_step_end=stop, **SETTINGS)
    assert addresses(*pipe.models.values()) == homes
    assert torch.equal(pipe("a red circle", **SETTINGS).images, wanted)


def test_unknown_offload():
    with pytest.raises(ValueError, match="unknown offload 'stage'; did you mean 'stages'"):
        checked_offload("stage")


def test_models_without_blocks_travel_whole():
    assert isinstance(model(), MMDiT)
    assert set(tensors_of(nn.Linear(2, 2))) == {"rest"}


def test_freed_memory_of_the_host_is_given_back_once(small, monkeypatch):
    """Where weights were gathered, and after the drawing that they were gathered for."""
    given = []
    monkeypatch.setattr("mmdit.runtime.streaming.give_back", lambda: given.append(1))
    turns = Residency("cpu", moves=True)
    for calls in (2, 2, 2):
        turns.enter({small: WHOLE})
        turns.drawn()
        assert len(given) == calls, "weights are gathered once"
        turns.leave()
    weight = small.joint_blocks[0].x_block.mlp.fc2.weight
    small.joint_blocks[0].x_block.mlp.fc2.weight = nn.Parameter(weight.clone(), requires_grad=False)
    turns.enter({small: WHOLE})
    turns.leave()
    assert len(given) == 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason=SKIPS["memory"])
def test_malloc_gives_back_what_lies_between_what_is_used():
    """Blocks that are too small for pages of their own, of which the last one is kept: the heap cannot shrink."""
    blocks = [torch.ones(25_000) for _ in range(1000)]
    last, before = blocks[-1], host_bytes()
    del blocks
    give_back()
    assert before - host_bytes() > 60_000_000
    assert bool((last == 1).all())
