"""Captures: the right values under the right labels, nothing left behind, and never more than the budget."""

from dataclasses import replace

import pytest
import torch

import mmdit
import tiny
from inspected import CONFIG, PATCHES, TEXT, drawn, drawn_with, encoded, inputs, model, untouched
from mmdit import reducers
from mmdit.inspection.addresses import Address, Word
from mmdit.inspection.attention import pattern_rows
from mmdit.models.attention import Attended, Joint
from mmdit.pipeline.passes import Branch, Drawing, Pass
from quant.quantize import quantize_

X = "joint_blocks.1.x_block"
POST = f"{X}.resid_post"


@pytest.fixture(scope="module")
def demo():
    return mmdit.Pipeline.demo()


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium"])
def test_values_are_those_of_plain_hooks_on_diffusers(tiny_folders, name):
    """By names of ours and of theirs, with the same weights, in float64."""
    folder = tiny_folders[name]
    theirs = tiny.load(folder).transformer.double()
    ours = mmdit.load_mmdit(folder, dtype=torch.float64)
    seen, dual = {}, name == "sd3.5-medium"

    def hook(key, module, side="output", part=0):
        def keep(_, args, kwargs, output):
            given = output if side == "output" else (*args, *kwargs.values())
            seen[key] = given[part] if isinstance(given, tuple) else given

        module.register_forward_hook(keep, with_kwargs=True)

    for i, block in enumerate(theirs.transformer_blocks):
        ends, front, attention = i == tiny.DEPTH - 1, f"joint_blocks.{i}", block.attn
        for ours_part, theirs_part in zip("qkv", ("to_q", "to_k", "to_v"), strict=True):
            hook(f"{front}.x_block.attn.{ours_part}", getattr(attention, theirs_part))
            hook(f"{front}.context_block.attn.{ours_part}", getattr(attention, f"add_{theirs_part[3:]}_proj"))
        if attention.norm_q is not None:
            hook(f"{front}.x_block.attn.q_normed", attention.norm_q)
            hook(f"{front}.context_block.attn.k_normed", attention.norm_added_k)
        if dual and i < 2:
            hook(f"{front}.x_block.attn2.out", block.attn2.to_out[0])
            hook(f"{front}.x_block.attn2.z", block.attn2.to_out[0], "input")
        hook(f"{front}.x_block.attn.z", attention.to_out[0], "input")
        hook(f"{front}.x_block.attn.out", attention.to_out[0])
        hook(f"{front}.x_block.mlp.post", block.ff.net[2], "input")
        hook(f"{front}.x_block.mlp.out", block.ff)
        hook(f"{front}.x_block.resid_mid", block.norm2, "input")
        hook(f"{front}.x_block.resid_post", block, "output", 1)
        if not ends:
            hook(f"{front}.context_block.attn.z", attention.to_add_out, "input")
            hook(f"{front}.context_block.mlp.pre", block.ff_context.net[0].proj)
            hook(f"{front}.context_block.resid_post", block, "output", 0)
    latent = torch.randn(2, 16, 6, 8).double()
    context, pooled = torch.randn(2, 9, tiny.T5_WIDTH).double(), torch.randn(2, tiny.CLIP_L + tiny.CLIP_G).double()
    with torch.no_grad(), mmdit.capture(ours, list(seen) or "*", budget=None) as captured:
        theirs(latent, context, pooled, torch.tensor([700.0, 20.0]), return_dict=False)
        ours(latent, torch.tensor([700.0, 20.0]), context, pooled)
    assert len(seen) > 30
    for key, value in seen.items():
        found = captured[key][0]
        if found.ndim == 4:  # ours are [sample, head, token, channel]; theirs have heads side by side or before tokens
            wanted = value if value.ndim == 3 else value.transpose(1, 2).flatten(2)
            found = found.transpose(1, 2).flatten(2)
        else:
            wanted = value
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=key)


def test_heads_add_up_to_the_projections_output_and_patterns_to_z():
    small = model()
    with mmdit.capture(small, ["joint_blocks.*", "*.attend*"], budget=None) as seen:
        small(*inputs())
    for block in range(CONFIG.depth):
        for attend in ("attend", "attend2") if block == 0 else ("attend",):
            p, v, z = (seen[f"joint_blocks.{block}.{attend}.{part}"][0] for part in ("pattern", "v", "z"))
            torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
            torch.testing.assert_close(p @ v, z)
            streams = ("x_block",) if attend == "attend2" or block == 2 else ("x_block", "context_block")
            for stream in streams:
                name = f"joint_blocks.{block}.{stream}.{attend.replace('attend', 'attn')}"
                of_stream = z[:, :, -PATCHES:] if stream == "x_block" else z[:, :, :TEXT]
                assert torch.equal(seen[f"{name}.z"][0], of_stream)
                projection = small.get_submodule(f"{name}.proj")
                summed = seen[f"{name}.out_by_head"][0].sum(1) + projection.bias
                torch.testing.assert_close(summed, seen[f"{name}.out"][0])


def test_pattern_in_blocks_of_rows_is_the_dense_one():
    q, k = torch.randn(2, 3, 11, 8).double(), torch.randn(2, 3, 7, 8).double()
    dense = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    for most in (1, 2 * 3 * 7 * 8 * 4, 10**9):  # one row, four rows, all
        parts = list(pattern_rows(Attended(Joint(), q, k, k), limit=most))
        torch.testing.assert_close(torch.cat([part for _, part in parts], 2), dense)
    assert len(list(pattern_rows(Attended(Joint(), q, k, k), limit=1))) == 11
    half = next(pattern_rows(Attended(Joint(), q.half(), k.half(), k.half())))[1]
    assert half.dtype == torch.float32


def test_a_drawing_is_the_same_and_branches_are_told_apart(demo):
    plain = drawn(demo)
    with untouched(demo), mmdit.capture(demo, [POST, f"{X}.attn.q"], budget=None) as seen:
        assert torch.equal(drawn(demo), plain)
    cond, uncond = encoded(demo, "a red circle"), encoded(demo, "")
    levels = demo.sigmas(3).tolist()
    found = seen.labelled(POST)
    assert found.dims == ("step", "branch", "sample", "token", "channel")
    assert found.labels("branch") == ("uncond", "cond")
    assert found.labels("sigma") == tuple(levels[:3])
    noise = demo.noise(1)
    for branch, read in (("cond", cond), ("uncond", uncond)):
        with mmdit.capture(demo.transformer, POST, budget=None) as alone, torch.no_grad():
            demo.transformer(noise, torch.tensor([1000.0 * levels[0]]), read.context, read.pooled)
        torch.testing.assert_close(found.sel(step=0, branch=branch).values, alone[POST][0], rtol=1e-4, atol=1e-4)
    difference = found.sel(step=0, branch="cond").values - found.sel(step=0, branch="uncond").values
    assert difference.abs().max() > 0.1


def test_addresses_narrow(demo):
    with untouched(demo), mmdit.capture(demo, [f"{X}.attn.z", "joint_blocks.1.attend.pattern"], budget=None) as whole:
        drawn(demo, ["a red circle", "a blue star"])
    narrow = {"steps": [0, -1], "branch": "cond", "samples": 1, "heads": [3, 1], "tokens": slice(2, 5)}
    with mmdit.capture(demo, ["transformer." + f"{X}.attn.z", "*1.attend.pattern"], **narrow, budget=None) as seen:
        drawn(demo, ["a red circle", "a blue star"])
    wanted = whole.labelled(f"{X}.attn.z").sel(step=[0, 2], branch="cond", sample=[1], head=[3, 1], token=[2, 3, 4])
    assert torch.equal(seen[f"{X}.attn.z"], wanted.values)
    assert seen.labelled(f"transformer.{X}.attn.z").axes == dict(wanted.axes)
    columns = whole.labelled("joint_blocks.1.attend.pattern").sel(step=[0, 2], branch="cond", sample=[1], head=[3, 1])
    found = seen.labelled("joint_blocks.1.attend.pattern")
    torch.testing.assert_close(found.values, columns.sel(key=[2, 3, 4]).values)
    assert found.labels("key") == (2, 3, 4)


def test_levels_queries_channels_and_masks_narrow(demo):
    levels = demo.sigmas(3).tolist()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2, 3] = mask[4, 0] = True
    with mmdit.capture(demo, POST, branch="cond", budget=None) as whole:
        drawn(demo)
    with mmdit.capture(
        demo, POST, branch="cond", sigmas=(0.0, levels[1]), tokens=mask, channels=[7], budget=None
    ) as seen:
        drawn(demo)
    assert torch.equal(seen[POST], whole[POST][1:, :, [19, 32]][..., [7]])
    with mmdit.capture(demo, "*0.attend.pattern", steps=0, branch="cond", queries=[5, 150], budget=None) as rows:
        drawn(demo)
    with mmdit.capture(demo, "*0.attend.pattern", steps=0, branch="cond", budget=None) as every:
        drawn(demo)
    (name,) = every
    torch.testing.assert_close(rows[name], every[name][:, :, :, [5, 150]])
    assert rows.labelled(name).labels("query") == (5, 150)


def test_words_are_found_in_each_prompt_and_encoder(demo):
    context = "joint_blocks.1.context_block.resid_post"
    prompts = ["a red circle", "a blue star above a red circle"]
    with mmdit.capture(demo, context, branch="cond", steps=0, budget=None) as whole:
        drawn(demo, prompts)
    with mmdit.capture(demo, context, branch="cond", steps=0, tokens="circle", budget=None) as seen:
        drawn(demo, prompts)
    read = encoded(demo, prompts)
    for sample, prompt in enumerate(prompts):
        start = prompt.index("circle")
        places = sorted({span.position for span in read.spans[sample] if span.start == start and span.stop > start})
        assert len(places) == 2  # CLIP-L and CLIP-G share one, T5 has its own
        assert torch.equal(seen[context][0, sample], whole[context][0, sample, places])
    with mmdit.capture(demo, context, branch="cond", steps=0, tokens=Word("circle", "t5"), budget=None) as one:
        drawn(demo, prompts)
    assert torch.equal(one[context][0, :, 0], seen[context][0, :, 1])
    with pytest.raises(ValueError, match=r"the prompt '' \(branch 'uncond', sample 0\) has no token of 'circle'"):
        drawn_with(demo, prompts, context, tokens="circle")
    with pytest.raises(ValueError, match="1, 2 tokens in samples"):
        drawn_with(
            demo, ["a red circle", "a red star above a red circle"], context, branch="cond", tokens=Word("red", "t5")
        )
    with pytest.raises(ValueError, match=r"names words; the tokens of .* are not the prompt's"):
        drawn_with(demo, prompts, POST, branch="cond", tokens="circle")


def test_a_solver_with_several_calls_a_step(demo):
    with mmdit.capture(demo, POST, branch="cond", reduce=reducers.norm(), budget=None) as seen:
        drawn(demo, sampler="heun")
    found, levels = seen.labelled(POST), demo.sigmas(3).tolist()
    assert found.labels("step") == (0, 0, 1, 1, 2)
    assert found.labels("call") == (0, 1, 0, 1, 0)
    assert found.labels("sigma") == (levels[0], levels[1], levels[1], levels[2], levels[2])
    assert found.sel(step=1).values.shape[0] == 2
    once = 3 * 64 * 4
    with (
        pytest.raises(mmdit.BudgetError, match="the next call, of step 1, would add 256 bytes to the 768 bytes"),
        mmdit.capture(demo, POST, branch="cond", reduce=reducers.norm(), budget=once) as part,
    ):
        drawn(demo, sampler="heun")
    assert part.nbytes == once


def test_branches_of_different_lengths_run_apart(demo):
    cond, uncond = encoded(demo, ["a red circle"] * 2), encoded(demo, ["", ""])
    uncond = replace(uncond, context=uncond.context[:, :80])
    name = "joint_blocks.1.context_block.resid_post"
    with untouched(demo), mmdit.capture(demo, [name, POST], budget=None) as seen, torch.no_grad():
        list(demo.sample(cond, uncond, demo.noise(1, count=2), num_inference_steps=2, guidance_scale=3.0))
    assert seen.labelled(name, branch="cond").values.shape == (2, 2, 93, 256)
    assert seen.labelled(name, branch="uncond").values.shape == (2, 2, 80, 256)
    assert seen.labelled(POST).labels("call") == (0, 0)
    assert seen[POST].shape == (2, 2, 2, 64, 256)
    with pytest.raises(ValueError, match=r"does not stack: values have shapes .*branch=\.\.\."):
        seen[name]
    levels = demo.sigmas(2).tolist()
    with torch.no_grad(), mmdit.capture(demo.transformer, name, budget=None) as alone:
        time = torch.tensor([1000 * levels[0]] * 2)
        demo.transformer(demo.noise(1, count=2), time, uncond.context, uncond.pooled)
    found, wanted = seen.labelled(name, branch="uncond").values[0], alone[name][0]
    assert tiny.error(found, wanted) < 1e-5  # memory at other places may add in another order


def test_predictions_outside_of_a_drawing_are_counted(demo):
    cond = encoded(demo, "a red circle")
    with torch.no_grad(), mmdit.capture(demo, POST, budget=None) as seen:
        for sigma in (0.9, 0.5):
            demo.predict(demo.noise(1), sigma, [Branch(cond), Branch(cond, "skip", (2,))])
        demo.transformer(demo.noise(1), torch.tensor([300.0]), cond.context, cond.pooled)
    labels = [entry.label for entry in seen.of(POST).entries]
    assert [(label.step, label.sigma, label.branch) for label in labels] == [
        (0, 0.9, "cond"),
        (0, 0.9, "skip"),
        (1, 0.5, "cond"),
        (1, 0.5, "skip"),
        (0, None, None),
    ]
    with (
        pytest.raises(KeyError, match="was never passed"),
        mmdit.capture(demo, POST, branch="skip", budget=None) as never,
    ):
        demo.predict(demo.noise(1), 0.5, [Branch(cond)])
        never[POST]


def test_branches_may_differ_by_step(demo):
    """A drawing says of each step which branches run; a pass on other rows than were announced is refused."""
    cond, uncond = Branch(encoded(demo, "a red circle")), Branch(encoded(demo, ""), "uncond")
    drawing = Drawing((1.0, 0.5, 0.25, 0.0), ((uncond, cond), (cond,), (cond,)), (1, 16, 16, 16))
    meant = Address(branch="uncond").meant(drawing)
    assert [(label.step, label.sigma, branch) for label, branch in meant] == [(0, 1.0, uncond)]
    assert [label.step for label, _ in Address(branch="cond", steps=-1).meant(drawing)] == [2]
    with pytest.raises(ValueError, match="meet none"):
        Address(branch="uncond", sigmas=(0.0, 0.5)).meant(drawing)
    text, said = cond.conditioning, r"2 branches of 1 samples .* 1 rows"
    with untouched(demo), mmdit.capture(demo, POST), pytest.raises(RuntimeError, match=said):
        for watcher in demo.watchers:
            watcher(Pass(0, 1.0, (uncond, cond), 1))
        demo.transformer(demo.noise(1), torch.tensor([1000.0]), text.context, text.pooled)


def test_encoders_and_vae_count_calls(demo):
    names = ["clip_l.text_model.encoder.layers.1.resid_post", "t5.encoder.block.0.layer.1.DenseReluDense.post"]
    with untouched(demo), mmdit.capture(demo, [*names, "vae.decoder.mid.attn_1.update"], budget=None) as seen:
        drawn(demo, output_type="pt")
    assert seen[names[0]].shape == (2, 1, 77, 64)  # the prompt, then the negative prompt
    assert seen[names[1]].shape == (2, 1, 16, 512)
    assert seen["vae.decoder.mid.attn_1.update"].shape == (1, 1, 64, 16, 16)
    with mmdit.capture(demo.clip_l, "*layers.1.resid_post", budget=None) as alone:
        encoded(demo, "a red circle")
    assert torch.equal(alone["text_model.encoder.layers.1.resid_post"][0], seen[names[0]][0])
    with pytest.raises(ValueError, match="branch= narrows passes of a pipeline's transformer"):
        drawn_with(demo, "a red circle", names, branch="cond")


def test_nested_captures_and_maps_work(demo):
    plain = drawn(demo)
    points = [POST, "joint_blocks.1.attend.z"]
    with (
        untouched(demo),
        mmdit.capture(demo, POST, budget=None) as outer,
        mmdit.attention_maps(demo, "circle") as maps,
        mmdit.capture(demo, points, steps=1, budget=None) as inner,
    ):
        assert torch.equal(drawn(demo), plain)
    assert torch.equal(outer[POST][1:2], inner[POST])
    assert maps.of("circle", block=1).shape == (8, 8)


@pytest.mark.parametrize("where", ["inside the block", "inside a layer", "in a planner"])
def test_an_exception_leaves_no_hooks(demo, where, tmp_path, monkeypatch):
    path = tmp_path / "seen.safetensors"
    if where == "inside a layer":
        broken = torch.Tensor.square
        monkeypatch.setattr(demo.transformer.joint_blocks[2].x_block.mlp, "forward", lambda _: broken("no tensor"))
    error, budget = (mmdit.BudgetError, 10) if where == "in a planner" else (TypeError, None)
    with pytest.raises(error), untouched(demo), mmdit.capture(demo, "joint_blocks.*", to=path, budget=budget):
        drawn(demo)
        raise TypeError("of the user's own")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, on importing its compiler
def test_a_compiled_model_is_refused():
    small = model()
    small.joint_blocks[1].compile()
    for look in (mmdit.points, lambda one: mmdit.capture(one, "*").__enter__()):
        with pytest.raises(
            ValueError, match=r"joint_blocks.1 is compiled .* a hook that is added after compiling never"
        ):
            look(small)
    whole = torch.compile(model())
    with pytest.raises(ValueError, match="is compiled"):
        mmdit.points(whole)
    with pytest.raises(ValueError, match="is compiled"), mmdit.patch(whole, "*", scale=2.0):
        pass


def test_quantized_models(demo):
    pipe = mmdit.Pipeline.demo()
    quantize_(pipe.transformer, "fp8")
    plain = drawn(pipe)
    linear = pipe.transformer.joint_blocks[1].x_block.attn.proj
    seen_plainly = []
    handle = linear.register_forward_hook(lambda _, args, output: seen_plainly.append((args[0], output)))
    with mmdit.capture(pipe, [f"{X}.attn.z", f"{X}.attn.out", f"{X}.attn.out_by_head"], steps=1, budget=None) as seen:
        assert torch.equal(drawn(pipe), plain)
    handle.remove()
    z, out = seen_plainly[1]
    assert torch.equal(seen[f"{X}.attn.z"][0].flatten(0, 1).transpose(1, 2).flatten(2), z)
    assert torch.equal(seen[f"{X}.attn.out"][0].flatten(0, 1), out)
    summed = seen[f"{X}.attn.out_by_head"][0].sum(2).flatten(0, 1) + linear.bias
    torch.testing.assert_close(summed, z @ linear.weight.dequantize().T + linear.bias, rtol=1e-4, atol=1e-4)
    assert tiny.error(summed, out) < 0.05  # the projection rounds what it reads
    assert not torch.equal(plain, drawn(demo))


def test_wrong_addresses_are_explained(demo):
    for address, said in (
        ({"heads": 1}, r"heads= is given, but .* has none: it is \[batch, token, channel\]"),
        ({"steps": [7]}, "this drawing has 3 steps .* meet none"),
        ({"branch": "skip"}, "branches 'uncond', 'cond'; .*branch='skip' meet none"),
        ({"samples": [2]}, r"samples \[2\] do not exist; there are 1"),
        ({"tokens": [64]}, r"tokens \[64\] do not exist; there are 64"),
        ({"sigmas": (0.5, 0.1)}, "sigmas are the lowest and the highest level"),
    ):
        with pytest.raises(ValueError, match=said):
            drawn_with(demo, "a red circle", POST, **address)
    small = model()
    with (
        pytest.raises(ValueError, match="counts from the end, which is known within a drawing only"),
        mmdit.capture(small, "*resid_post", steps=-1),
    ):
        small(*inputs())
    seen = drawn_with(demo, "a red circle", POST, steps=0)
    with pytest.raises(KeyError, match="was not captured; nearest of 1 are"):
        seen["joint_blocks.1.x_block.resid_pre"]


def test_a_module_without_qk_norm_still_fires():
    small = model(replace(CONFIG, qk_norm=None))
    with mmdit.capture(small, [f"{X}.attn.q", f"{X}.attn.q_normed"], budget=None) as seen:
        small(*inputs())
    assert torch.equal(seen[f"{X}.attn.q"], seen[f"{X}.attn.q_normed"])
