"""Patches: exactly what is addressed changes, as a formula says; and sweeps."""

import pytest
import torch

import mmdit
from inspected import CONFIG, PATCHES, TEXT, inputs, left_behind, model, untouched
from mmdit.inspection.hooks import points_of
from mmdit.inspection.views import by_head
from quant.quantize import quantize_

X = "joint_blocks.1.x_block"
Z, POST, PATTERN = f"{X}.attn.z", f"{X}.resid_post", "joint_blocks.1.attend.pattern"


@pytest.fixture(scope="module")
def demo():
    return mmdit.Pipeline.demo()


@pytest.fixture(scope="module")
def small():
    return model()


def drawn(pipe, prompts="a red circle", **settings):
    chosen = {"seed": 1, "num_inference_steps": 3, "output_type": "latent", "max_sequence_length": 16} | settings
    return pipe(prompts, **chosen).images


def changed(model, points, *, given=None, **operation):
    with mmdit.patch(model, points, **operation):
        return model(*(given or inputs()))


def value_of(model, point, given=None, **address):
    with mmdit.capture(model, point, **address, budget=None) as seen:
        model(*(given or inputs()))
    return seen[point][0]


def test_identity_patches_are_bit_equal(demo):
    plain = drawn(demo)
    names = [row.name for row in mmdit.points(demo) if not row.name.endswith((".pattern", ".out_by_head"))]
    assert len(names) > 350
    with untouched(demo), mmdit.patch(demo, names, apply=lambda value: value):
        assert torch.equal(drawn(demo), plain)
    with mmdit.patch(demo, "*.attn.z", scale=1.0, heads=[1], tokens=[2, 3], branch="cond", steps=slice(1, None)):
        assert torch.equal(drawn(demo), plain)
    with mmdit.patch(demo, "*.attend.pattern", apply=lambda value: value):
        torch.testing.assert_close(drawn(demo), plain, rtol=1e-4, atol=1e-4)


SHARES = {"attn.q": 1 / 3, "attn.k_normed": 1, "adaln.gate_msa": 1 / 6, "attn.z": 1, "mlp.post": 1, "resid_post": 1}


@pytest.mark.parametrize("part", SHARES)
def test_what_is_not_addressed_keeps_its_bits(small, part):
    """Seen by a plain hook on the module: another sample, and the other parts of a tensor, stay."""
    point, passed = f"{X}.{part}", []
    module, side = points_of(small)[point].module, points_of(small)[point].side

    def keep(_, args, output):
        passed.append(args if side == "input" else output if isinstance(output, torch.Tensor) else output[1])

    def run(**operation):
        with mmdit.patch(small, point, **operation):
            handle = small.get_submodule(module).register_forward_hook(keep)
            small(*inputs())
            handle.remove()
        return passed[-1][0] if side == "input" else passed[-1]

    before, after = run(scale=1.0), run(scale=2.0, samples=[1])
    moved = before != after
    assert torch.equal(before[0], after[0])
    assert moved[1].double().mean() == pytest.approx(SHARES[part])


def test_ablating_a_head_is_zeroing_its_columns(small):
    columns = small.joint_blocks[1].x_block.attn.proj.weight
    kept = columns.clone()
    ablated = changed(small, Z, ablate="zero", heads=[1])
    columns[:, 64:128] = 0
    by_hand = small(*inputs())
    columns.copy_(kept)
    torch.testing.assert_close(ablated, by_hand)
    assert (ablated - small(*inputs())).abs().max() > 1e-3


def test_operations_do_what_they_say(small):
    value = value_of(small, POST)
    direction, patched = torch.randn(128).double(), {}

    def note(**operation):
        with mmdit.patch(small, POST, **operation):
            return value_of(small, POST)

    patched["add"] = note(add=3 * direction, tokens=[0, 4])
    wanted = value.clone()
    wanted[:, [0, 4]] += 3 * direction
    torch.testing.assert_close(patched["add"], wanted)
    torch.testing.assert_close(note(scale=0.5), value / 2)
    assert torch.equal(note(replace=torch.zeros(()))[0], torch.zeros_like(value[0]))
    torch.testing.assert_close(note(ablate="mean"), value.mean((0, 1), keepdim=True).expand_as(value))
    assert torch.equal(note(ablate="resample"), value[[1, 0]])
    assert torch.equal(note(swap=(0, 1)), value[[1, 0]])
    assert torch.equal(note(swap=(0, 1), tokens=[2])[:, 3], value[:, 3])
    assert torch.equal(note(apply=lambda part: part.flip(1), samples=0)[1], value[1])
    one = value.clone()
    one[1, :, 5] = value[:, :, 5].mean()
    torch.testing.assert_close(note(ablate="mean", samples=1, channels=5), one)


def test_swapped_samples_swap_what_follows(small):
    """With the same noise level and pooled text for both, all of the second branch of the model goes along."""
    latent, time, context, pooled = inputs()
    given = latent, time[:1].expand(2), context, pooled[:1].expand(2, -1)
    plain = small(*given)
    both = ["joint_blocks.1.x_block.resid_post", "joint_blocks.1.context_block.resid_post"]
    torch.testing.assert_close(changed(small, both, given=given, swap=(0, 1)), plain[[1, 0]])


def test_values_of_another_run_lead_to_its_output(small):
    ours, other = inputs(1), inputs(2)
    other = (other[0], ours[1], other[2], ours[3])
    both = ["joint_blocks.1.*.resid_post"]
    with mmdit.capture(small, both, budget=None) as seen:
        wanted = small(*other)
    torch.testing.assert_close(changed(small, both, given=ours, replace=seen), wanted)
    torch.testing.assert_close(changed(small, both, given=ours, ablate="resample", source=seen), wanted)
    branch = changed(small, both, given=ours, replace=seen, samples=[1])
    torch.testing.assert_close(branch[1], wanted[1])
    assert torch.equal(branch[0], small(*ours)[0])
    mean = value_of(small, both[0].replace("*", "x_block"), given=ours)
    with mmdit.patch(small, POST, ablate="mean", source=seen):
        found = value_of(small, POST, given=ours)
    torch.testing.assert_close(found, seen[POST][0].mean((0, 1), keepdim=True).expand_as(mean))


def test_a_part_is_taken_out_of_a_whole_capture(small):
    ours, other = inputs(1), inputs(2)
    with mmdit.capture(small, Z, budget=None) as seen:
        small(*other)
    with mmdit.patch(small, Z, replace=seen, heads=1, tokens=[2, 5], samples=1):
        found = value_of(small, Z, given=ours)
    wanted = value_of(small, Z, given=ours)
    wanted[1, 1, [2, 5]] = seen[Z][0, 1, 1, [2, 5]]
    assert torch.equal(found, wanted)
    with mmdit.capture(small, Z, heads=1, tokens=[2, 5], samples=1, budget=None) as part:
        small(*other)
    with mmdit.patch(small, Z, replace=part, heads=1, tokens=[2, 5]):
        assert torch.equal(value_of(small, Z, given=ours)[1], wanted[1])


def test_a_frozen_pattern(small):
    """Attention's output is the pattern of the other run times the values of this one."""
    ours, other = inputs(1), inputs(2)
    with mmdit.capture(small, PATTERN, budget=None) as seen:
        small(*other)
    v = value_of(small, "joint_blocks.1.attend.v", given=ours)
    with mmdit.patch(small, PATTERN, replace=seen):
        z = value_of(small, "joint_blocks.1.attend.z", given=ours)
    torch.testing.assert_close(z, seen[PATTERN][0] @ v)
    plain = value_of(small, "joint_blocks.1.attend.z", given=ours)
    with mmdit.patch(small, PATTERN, replace=seen, heads=[1], queries=[3]):
        part = value_of(small, "joint_blocks.1.attend.z", given=ours)
    torch.testing.assert_close(part[:, 1, 3], z[:, 1, 3])
    part[:, 1, 3] = plain[:, 1, 3]
    assert torch.equal(part, plain)
    with mmdit.patch(small, PATTERN, ablate="zero", tokens=slice(0, TEXT)):  # nobody reads the text
        blind = value_of(small, "joint_blocks.1.attend.z", given=ours)
    p = value_of(small, PATTERN, given=ours)
    torch.testing.assert_close(blind, p[..., TEXT:] @ v[:, :, TEXT:])
    assert p.shape[-1] == TEXT + PATCHES


def test_skipped_blocks(small):
    assert torch.equal(changed(small, "joint_blocks.1", skip=True), small(*inputs(), skip_layers=(1,)))
    assert torch.equal(changed(small, "joint_blocks.*", skip=True), small(*inputs(), skip_layers=(0, 1, 2)))
    only_image = changed(small, "joint_blocks.1.x_block", skip=True)
    assert not torch.equal(only_image, small(*inputs(), skip_layers=(1,)))
    with pytest.raises(ValueError, match=r"'joint_blocks.7' matches no block; blocks are joint_blocks.0"):
        changed(small, "joint_blocks.7", skip=True)


def test_blocks_of_encoders_and_vae(demo):
    layer = "clip_l.text_model.encoder.layers.1"
    points = [f"{layer}.resid_pre", "clip_l.*layers.2.resid_pre"]
    with mmdit.capture(demo, points, budget=None) as seen, mmdit.patch(demo, layer, skip=True):
        demo.encode("a red circle")
    assert torch.equal(seen[f"{layer}.resid_pre"], seen["clip_l.text_model.encoder.layers.2.resid_pre"])
    latent = demo.noise(1)
    plain = demo.decode(latent)
    with untouched(demo), mmdit.patch(demo, "vae.decoder.mid.block_2.update", ablate="zero"):
        assert not torch.equal(demo.decode(latent), plain)


def test_branches_and_steps_of_a_drawing(demo):
    seen = {}
    for name, operation in {
        "plain": {"scale": 1.0},
        "patched": {"ablate": "zero", "branch": "cond", "steps": 1},
    }.items():
        with (
            untouched(demo),
            mmdit.patch(demo, POST, **operation),
            mmdit.capture(demo, POST, budget=None) as seen[name],
        ):
            drawn(demo)
    plain, patched = (seen[name].labelled(POST) for name in ("plain", "patched"))
    assert torch.equal(plain.sel(step=0).values, patched.sel(step=0).values)
    assert torch.equal(plain.sel(step=1, branch="uncond").values, patched.sel(step=1, branch="uncond").values)
    assert patched.sel(step=1, branch="cond").values.abs().max() == 0
    assert not torch.equal(plain.sel(step=2).values, patched.sel(step=2).values)


def test_words_and_another_prompts_drawing(demo):
    """The tokens of a word, taken from a drawing in which the word is another."""
    settings = {"guidance_scale": 1.0}
    after = "joint_blocks.0.context_block.resid_post"
    with mmdit.capture(demo, after, tokens="blue", branch="cond", budget=None) as seen:
        drawn(demo, "a blue circle", **settings)
    with (
        mmdit.patch(demo, after, replace=seen, tokens="red", branch="cond"),
        mmdit.capture(demo, after, budget=None) as found,
    ):
        drawn(demo, "a red circle", **settings)
    places = [1 + 1, 77 + 1]  # "a" is first, of CLIP after its start
    assert torch.equal(found[after][:, 0][:, :, places], seen[after])


def test_quantized_models_are_patched():
    pipe = mmdit.Pipeline.demo()
    quantize_(pipe.transformer, "fp8")
    plain = drawn(pipe)
    with untouched(pipe), mmdit.patch(pipe, ["*.attn.q", "*.attn.z", "*.mlp.post"], apply=lambda value: value):
        assert torch.equal(drawn(pipe), plain)
    with mmdit.patch(pipe, Z, ablate="zero", heads=2):
        assert not torch.equal(drawn(pipe), plain)


@pytest.mark.parametrize("where", ["in the block", "in the change", "in the model"])
def test_an_exception_leaves_nothing_behind(demo, where, monkeypatch):
    plain = drawn(demo)

    def fail(*_):
        raise ZeroDivisionError(where)

    if where == "in the model":
        monkeypatch.setattr(demo.transformer.final_layer, "forward", fail)
    change = fail if where == "in the change" else lambda value: value * 2
    with pytest.raises(ZeroDivisionError, match=where), untouched(demo), mmdit.patch(demo, "*.resid_mid", apply=change):
        drawn(demo)
        fail()
    monkeypatch.undo()
    assert torch.equal(drawn(demo), plain)


def test_order_is_the_order_of_entering(small):
    plain = value_of(small, POST)
    with mmdit.patch(small, POST, scale=2.0), mmdit.patch(small, POST, add=1.0):
        torch.testing.assert_close(value_of(small, POST), 2 * plain + 1)
    with (
        mmdit.capture(small, POST, budget=None) as before,
        mmdit.patch(small, POST, scale=2.0),
        mmdit.capture(small, POST, budget=None) as after,
    ):
        small(*inputs())
    assert torch.equal(2 * before[POST], after[POST])


def test_wrong_patches_are_explained(small, demo):
    def refuse(said, points=Z, **operation):
        with pytest.raises(ValueError, match=said):
            changed(small, points, **operation)

    refuse("a patch does one thing: give one of .*; got none")
    refuse("got scale, skip", scale=2.0, skip=True, points="joint_blocks.1")
    for operation in ("replace", "scale", "add"):
        refuse(rf"{operation}= is \[3\]", **{operation: torch.zeros(3)})
    refuse("source= is for", scale=1.0, source=mmdit.Captured(["a"]))
    refuse("is computed from z: patch .*attn.z' instead", points=f"{X}.attn.out_by_head", scale=2.0)
    refuse("swap=", swap=(0, 5))
    refuse("the patch was never applied", scale=2.0, steps=[3])
    with mmdit.capture(small, Z, reduce=mmdit.reducers.norm(), budget=None) as seen:
        small(*inputs())
    refuse("was captured with a reducer", replace=seen)
    with mmdit.capture(small, Z, budget=None) as seen:
        small(*inputs())
        small(*inputs())
    with pytest.raises(ValueError, match=r"holds no .* of step 2"), mmdit.patch(small, Z, replace=seen):
        for _ in range(3):
            small(*inputs())
    with pytest.raises(ValueError, match="takes another sample of the batch, which has one"):
        changed(small, Z, given=inputs(batch=1), ablate="resample")
    said = r"3 steps .*sigmas=\(2.0, 3.0\)"
    with pytest.raises(ValueError, match=said), untouched(demo), mmdit.patch(demo, Z, scale=2.0, sigmas=(2.0, 3.0)):
        drawn(demo)
    assert left_behind(small) == []


def test_gradients_flow_through_patches(small):
    strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    given = inputs()
    with mmdit.patch(small, Z, scale=strength, heads=1):
        out = small(*given).square().sum()
    (found,) = torch.autograd.grad(out, strength)
    with mmdit.patch(small, Z, scale=0.5 + 1e-6, heads=1):
        slope = (small(*given).square().sum() - out) / 1e-6
    torch.testing.assert_close(found, slope.detach(), rtol=1e-4, atol=1e-4)


def test_by_head_adds_up():
    linear = torch.nn.Linear(128, 7).double()
    z = torch.randn(2, 5, 128).double()
    torch.testing.assert_close(by_head(linear, z, CONFIG.heads).sum(1) + linear.bias, linear(z))


def test_a_sweep_measures_each_place(small):
    plain = small(*inputs())

    def moved():
        return (small(*inputs()) - plain).abs().mean((1, 2, 3))

    found = mmdit.sweep(small, "joint_blocks.*.x_block.attn.z", moved, over={"heads": [0, 1]}, ablate="zero")
    assert found.dims == ("point", "heads", "result_0")
    assert found.labels("point") == tuple(f"joint_blocks.{i}.x_block.attn.z" for i in range(3))
    for i in range(3):
        for head in (0, 1):
            by_hand = (changed(small, f"joint_blocks.{i}.x_block.attn.z", ablate="zero", heads=head) - plain).abs()
            assert torch.equal(found.values[i, head], by_hand.mean((1, 2, 3)))
    skipped = mmdit.sweep(small, ["joint_blocks.0", "joint_blocks.2"], lambda: float(moved().sum()), skip=True)
    by_hand = [(small(*inputs(), skip_layers=(i,)) - plain).abs().mean((1, 2, 3)).sum() for i in (0, 2)]
    torch.testing.assert_close(skipped.values.double(), torch.stack(by_hand), rtol=1e-5, atol=1e-5)
    parts = {"early": ["joint_blocks.0.*z", "*1.attend.z"], "late": "*2.attend.z"}
    both = mmdit.sweep(small, parts, moved, ablate="zero")
    assert both.labels("point") == ("early", "late")
    assert left_behind(small) == []
