"""Models taking turns: one group on the device at a time, nothing lost, nothing left."""

import pytest
import torch
from torch import nn

from mmdit import Pipeline
from mmdit.pipeline.arguments import checked_offload
from mmdit.runtime.offload import Turns

TEXT = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
SETTINGS = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt", "seed": 1}


@pytest.fixture
def copies(monkeypatch):
    """A device in name only: arriving there is a copy, which these tests count."""
    arrived = []
    whole = torch.Tensor.to

    def to(self, *args, **kwargs):
        if kwargs.get("non_blocking"):
            arrived.append(self.nbytes)
            return self.clone()
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    return arrived


def test_one_group_at_a_time(copies):
    one, two, turns = nn.Linear(2, 2), nn.BatchNorm1d(3), Turns("cpu")
    homes = {tensor: tensor.data_ptr() for model in (one, two) for tensor in model.state_dict(keep_vars=True).values()}
    turns.enter([one])
    assert all(tensor.data_ptr() != homes[tensor] for tensor in one.parameters())
    assert all(tensor.data_ptr() == homes[tensor] for tensor in two.parameters())
    turns.enter([one])
    assert len(copies) == 2  # it was there already
    turns.enter([two])
    assert all(tensor.data_ptr() == homes[tensor] for tensor in one.parameters())
    assert two.running_mean.data_ptr() != homes[two.running_mean]
    turns.leave()
    assert all(tensor.data_ptr() == home for tensor, home in homes.items())


def test_what_was_changed_on_the_device_is_brought_home(copies):
    model, turns = nn.Linear(2, 2), Turns("cpu")
    turns.enter([model])
    with torch.no_grad():
        model.weight.fill_(3.0)
    turns.leave()
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))


def test_pictures_are_the_same_and_nothing_stays(tiny_folders, copies):
    folder = tiny_folders["sd3.5-medium"]
    whole = Pipeline.from_pretrained(folder)
    pipe = Pipeline.from_pretrained(folder, offload="stages")
    homes = [tensor.data_ptr() for model in pipe.models.values() for tensor in model.parameters()]
    drawn = pipe("a red circle", **SETTINGS).images
    weights = sum(t.nbytes for model in pipe.models.values() for t in (*model.parameters(), *model.buffers()))
    assert sum(copies) == weights  # each stage came once
    assert torch.equal(drawn, whole("a red circle", **SETTINGS).images)
    assert [tensor.data_ptr() for model in pipe.models.values() for tensor in model.parameters()] == homes


def test_loras_of_models_that_take_turns(tiny_folders, copies):
    """Attached and merged while the transformer is on the device; unloading brings the old bits back."""
    whole, pipe = (Pipeline.from_pretrained(tiny_folders["sd3.5-large"], offload=one) for one in (None, "stages"))
    tensors = {}
    for i, (key, width) in enumerate((("transformer.transformer_blocks.1.attn.to_q", 128), (TEXT, 64))):
        for factor, shape in (("A", (2, width)), ("B", (width, 2))):
            tensors[f"{key}.lora_{factor}.weight"] = 0.3 * torch.randn(
                shape, generator=torch.Generator().manual_seed(i)
            )
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
def test_a_stopped_drawing_leaves_a_pipeline_that_draws_the_same(tiny_folders, copies, offload):
    pipe = Pipeline.from_pretrained(tiny_folders["sd3.5-large"], offload=offload)
    homes = [tensor.data_ptr() for model in pipe.models.values() for tensor in model.parameters()]
    wanted = pipe("a red circle", **SETTINGS).images

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a red circle", callback_on_step_end=stop, **SETTINGS)
    assert [tensor.data_ptr() for model in pipe.models.values() for tensor in model.parameters()] == homes
    assert torch.equal(pipe("a red circle", **SETTINGS).images, wanted)


def test_unknown_offload():
    with pytest.raises(ValueError, match="unknown offload 'stage'; did you mean 'stages'"):
        checked_offload("stage")
