"""The listing of points: shapes and bytes without a run, and names that are not there."""

import pytest
import torch

import mmdit
from inspected import inputs, left_behind, model


@pytest.fixture(scope="module")
def demo():
    return mmdit.Pipeline.demo()


def test_shapes_of_the_listing_are_those_of_a_run():
    small = model()
    listed = {row.name: row for row in mmdit.points(small, height=32, width=48, text_tokens=5, batch=2)}
    with mmdit.capture(small, "*", budget=None) as seen:
        small(*inputs())
    assert set(seen) == set(listed)
    for name, value in seen.items():
        assert tuple(value.shape[1:]) == listed[name].shape, name
        assert value.nbytes == listed[name].bytes, name
        assert value.dtype == listed[name].dtype, name


def test_all_models_of_a_pipeline_are_listed(demo):
    listed = mmdit.points(demo, height=64, width=96, batch=2)
    names = [row.name for row in listed]
    assert len(set(names)) == len(names)
    assert {name.split(".")[0] for name in names} == {"transformer", "vae", "clip_l", "clip_g", "t5"}
    with mmdit.capture(demo, "*", budget=None, steps=0) as seen:
        demo(["a red circle"] * 2, guidance_scale=1.0, height=64, width=96, num_inference_steps=1, output_type="latent")
        picture = demo.decode(torch.zeros(2, 16, 8, 12))
        demo.vae.encode(picture)
    assert set(seen) == {name.removeprefix("transformer.") for name in names}
    for row in listed:
        assert tuple(seen.of(row.name).entries[0].value.shape) == row.shape, row.name


def test_each_models_own_listing_is_part_of_the_pipelines(demo):
    every = mmdit.points(demo, height=64, width=64)
    for name, one in demo.models.items():
        own = mmdit.points(one, height=64, width=64)
        assert [f"{name}.{row.name}" for row in own] == [row.name for row in every if row.name.startswith(f"{name}.")]
        assert sum(row.bytes for row in own) == sum(row.bytes for row in every if row.name.startswith(f"{name}."))


def test_official_width_without_its_weights():
    with torch.device("meta"):
        large = mmdit.MMDiT(mmdit.MMDiTConfig(2, 2432, 4096, 2048, 192)).to(torch.bfloat16)
    listed = mmdit.points(large, ["*.x_block.attn.q", "*.attend.pattern"], height=1024, width=1024, batch=2)
    assert len(listed) == 4
    assert listed[0].shape == (2, 38, 4096, 64)
    assert listed[0].bytes == 2 * 4096 * 2432 * 2
    assert listed[1].shape == (2, 38, 333 + 4096, 333 + 4096)


def test_points_of_encoders_fit_together(demo):
    with mmdit.capture(demo, ["clip_g.*", "t5.*", "vae.*"], budget=None) as seen:
        demo.encode("a red circle", max_sequence_length=16)
        demo.vae.encode(demo.decode(demo.noise(1)))
    value = {name: seen.labelled(name).values[0] for name in seen}
    layers = [f"clip_g.text_model.encoder.layers.{i}" for i in range(4)]
    blocks = [f"t5.encoder.block.{i}" for i in range(2)]
    parts = {layer: (f"{layer}.self_attn", f"{layer}.mlp.out", "out_proj") for layer in layers}
    parts |= {one: (f"{one}.layer.0.SelfAttention", f"{one}.layer.1.DenseReluDense.out", "o") for one in blocks}
    for one, (attention, mlp, projection) in parts.items():
        torch.testing.assert_close(value[f"{one}.resid_pre"] + value[f"{attention}.out"], value[f"{one}.resid_mid"])
        torch.testing.assert_close(value[f"{one}.resid_mid"] + value[mlp], value[f"{one}.resid_post"])
        bias = demo.models[one.split(".")[0]].get_submodule(f"{attention.split('.', 1)[1]}.{projection}").bias
        summed = value[f"{attention}.out_by_head"].sum(1) + (0 if bias is None else bias)
        torch.testing.assert_close(summed, value[f"{attention}.out"], rtol=1e-4, atol=1e-5)
        assert value[f"{attention}.z"].shape == value[f"{attention}.v"].shape
    gate, pre, post = (value[f"t5.encoder.block.0.layer.1.DenseReluDense.{part}"] for part in ("gate", "pre", "post"))
    torch.testing.assert_close(torch.nn.functional.gelu(gate, approximate="tanh") * pre, post)
    blocks = [name.removesuffix(".update") for name in value if name.endswith(".update") and "attn" not in name]
    for one in blocks:
        torch.testing.assert_close(value[f"{one}.resid_pre"] + value[f"{one}.update"], value[f"{one}.resid_post"])
    for branch in ("encoder", "decoder"):
        before = value[f"vae.{branch}.mid.block_1.resid_post"] + value[f"vae.{branch}.mid.attn_1.update"]
        torch.testing.assert_close(before, value[f"vae.{branch}.mid.block_2.resid_pre"])


def test_listing_prints_as_a_table(demo):
    text = repr(mmdit.points(demo.transformer, "joint_blocks.3.*.attn.z"))
    assert text.splitlines()[1].split() == [
        "joint_blocks.3.x_block.attn.z",
        *("head,", "token,", "channel", "1x4x64x64", "float32", "0.066"),
    ]
    assert text.splitlines()[-1] == "1 points: 0.1 MB a call"


def test_points_are_narrowed_by_stream(demo):
    names = mmdit.points(demo.transformer, "joint_blocks.0.*", stream="text").names
    assert names
    assert all("context_block" in name for name in names)
    with pytest.raises(ValueError, match="but none in the stream 'image'"):
        mmdit.points(demo.transformer, "*.attend.pattern", stream="image")


def test_a_pattern_without_match_raises_with_the_nearest(demo):
    with pytest.raises(
        ValueError, match=r"'.*1.x_block.atn.q' matches none of \d+ points; nearest are .*1.x_block.attn\.q"
    ):
        mmdit.points(demo, "joint_blocks.1.x_block.atn.q")
    with pytest.raises(ValueError, match="height must be a multiple of 8 pixels, got 60"):
        mmdit.points(demo, height=60)
    with pytest.raises(TypeError, match="a Linear has no table of points"):
        mmdit.points(torch.nn.Linear(2, 2))


def test_nothing_is_left_behind(demo):
    before = [parameter.clone() for parameter in demo.transformer.parameters()]
    mmdit.points(demo)
    assert left_behind(*demo.models.values()) == []
    assert all(torch.equal(*pair) for pair in zip(before, demo.transformer.parameters(), strict=True))
