"""Attention maps are columns of the softmax, and the drawing under them does not change by a bit."""

from contextlib import contextmanager

import pytest
import torch

from full import FULL
from mmdit import MMDiT, MMDiTConfig, Pipeline, attention_maps
from mmdit.bench.maps import Loop
from mmdit.bench.random_models import Inputs
from mmdit.inspection import attention
from mmdit.inspection.attention_maps import _several
from mmdit.inspection.words import SPECIAL, token_positions, words_of
from mmdit.pipeline.passes import Branch
from refusals import refuses

PROMPTS = ["a red circle above a blue star", "a small ring, on white"]
WORDS = ["circle", "blue star", "a", "a#2", "ring", "<pad>"]
SIZES = {"height": 96, "width": 128}
LENGTH = {"max_sequence_length": 256 if FULL else 77}  # of the T5 tokens
TEXT = 77 + LENGTH["max_sequence_length"]
DIRECTIONS = ("i2t", "t2i")


@pytest.fixture(scope="module")
def wide():
    return Pipeline.demo(dtype=torch.float64)


@pytest.fixture(scope="module")
def demo():
    return Pipeline.demo()


def draw(pipe, prompts=PROMPTS, steps=2, **settings):
    seeds = list(range(len(prompts)))
    settings = {"num_inference_steps": steps, "output_type": "latent", **SIZES, **LENGTH} | settings
    return pipe(prompts, seed=seeds, **settings).images


@contextmanager
def patterns(pipe):
    """The whole softmax of every joint attention, by plain hooks on its queries and keys: passes x blocks."""
    found = []

    def keep(_, args):
        q, k, _ = args
        found.append((q @ k.mT / 8).softmax(-1))

    handles = [block.attend.register_forward_pre_hook(keep) for block in pipe.transformer.joint_blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def both(wide):
    """Maps of both directions and all encoders of each head, and the whole pattern: steps blocks b heads l l."""
    settings = {"direction": DIRECTIONS, "encoder": ("all", "clip", "t5"), "heads": "each", "dtype": torch.float64}
    with patterns(wide) as dense, attention_maps(wide, WORDS, **settings) as maps:
        draw(wide)
    pattern = torch.stack(dense).unflatten(0, (2, 4))[:, :, 2:]  # the rows of cond
    return maps, pattern, wide.encode(PROMPTS, **LENGTH)


@pytest.mark.parametrize("encoder", ["all", "clip", "t5"])
@pytest.mark.parametrize("word", WORDS)
def test_maps_are_columns_and_rows_of_the_softmax(both, word, encoder):
    maps, pattern, read = both
    for sample in range(2):
        places = token_positions(read, sample, word, encoder)
        found = {way: maps.word(word, encoder=encoder, direction=way)[:, :, :, sample] for way in DIRECTIONS}
        if not places:
            assert all(part.isnan().all() for part in found.values())
            continue
        one = pattern[:, :, sample]
        dense = {"i2t": one[..., TEXT:, places].sum(-1), "t2i": one[..., places, TEXT:].mean(-2)}
        for way, part in found.items():
            assert part.shape == (2, 4, 4, 6, 8)
            torch.testing.assert_close(part.flatten(-2), dense[way], rtol=0, atol=1e-12)


def test_quadrants_are_sums_of_the_softmax(both):
    maps, pattern, _ = both
    i, t = slice(TEXT, None), slice(0, TEXT)
    dense = torch.stack([pattern[..., a, b].sum((-1, -2)) for a, b in ((i, i), (i, t), (t, i), (t, t))], -1)
    found = maps.quadrants
    torch.testing.assert_close(found, dense.transpose(2, 3), rtol=0, atol=1e-9)
    rows = found.unflatten(-1, (2, 2)).sum(-1)
    torch.testing.assert_close(rows, torch.tensor([48.0, TEXT]).double().expand_as(rows), rtol=0, atol=1e-9)
    torch.testing.assert_close(maps.shares.unflatten(-1, (2, 2)).sum(-1), torch.ones_like(rows), rtol=0, atol=1e-9)


def test_all_text_together_is_the_quadrant(wide):
    """Every text token is in one word: what patches read of all of them is I2T, which is computed another way."""
    prompt = PROMPTS[0]
    names = list(dict.fromkeys([*words_of(prompt), *SPECIAL]))
    with attention_maps(wide, names, heads="each", dtype=torch.float64) as maps:
        draw(wide, [prompt])
    total = sum(maps.words.values()).sum((-1, -2))
    torch.testing.assert_close(total, maps.quadrants[..., 1], rtol=0, atol=1e-9)


def test_the_mean_over_heads(wide, both):
    with attention_maps(wide, WORDS, dtype=torch.float64) as maps:
        draw(wide)
    torch.testing.assert_close(
        maps.words["circle"], both[0].words["circle"].mean(2), rtol=0, atol=1e-14, equal_nan=True
    )
    assert list(maps.axes) == ["step", "block", "sample", "row", "column"]
    assert maps.words["circle"].shape == tuple(map(len, maps.axes.values())) == (2, 4, 2, 6, 8)
    assert maps.sigmas == wide.sigmas(2)[:2].tolist()


def test_blocks_of_heads_are_the_whole(wide, both, monkeypatch):
    """A limit so low that one head is computed after another."""
    monkeypatch.setattr(attention, "BYTES", 1)
    with attention_maps(wide, WORDS, dtype=torch.float64, direction="t2i") as maps:
        draw(wide)
    expected = both[0].word("circle", direction="t2i").mean(2)
    torch.testing.assert_close(maps.words["circle"], expected, rtol=0, atol=1e-14, equal_nan=True)


def test_no_words_and_all_words(demo):
    with attention_maps(demo, ()) as none, pytest.raises(KeyError, match="was not asked for"):
        draw(demo)
        none.words["red"]
    assert none.quadrants.shape == (2, 4, 4, 2, 4)
    with attention_maps(demo, quadrants=False) as every:
        draw(demo)
    assert list(every.words) == ["a", "red", "circle", "above", "blue", "star", "small", "ring", "on", "white"]
    refuses(lambda: every.quadrants, "quadrants=True", error=ValueError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_drawing_is_the_same_bit_by_bit(dtype):
    pipe = Pipeline.demo(dtype=dtype)
    plain = draw(pipe)
    with attention_maps(pipe, WORDS, heads="each", direction=DIRECTIONS) as maps:
        watched = draw(pipe)
    assert torch.equal(plain, watched)
    assert set(maps.how.values()) == {"fused"}
    assert torch.equal(plain, draw(pipe))


def test_low_precision_maps_are_those_of_its_own_queries_and_keys():
    """bfloat16 rounds q and k, not the map: float32 from there on, as close as float32 is."""
    pipe = Pipeline.demo(dtype=torch.bfloat16)
    dense = []
    with attention_maps(pipe, "circle", blocks=1) as maps:
        handle = pipe.transformer.joint_blocks[1].attend.register_forward_pre_hook(lambda _, args: dense.append(args))
        draw(pipe, PROMPTS[:1], steps=1)
        handle.remove()
    q, k, _ = (part[1].double() for part in dense[0])
    places = token_positions(pipe.encode(PROMPTS[0], **LENGTH), 0, "circle")
    expected = (q @ k.mT / 8).softmax(-1)[:, TEXT:, places].sum(-1).mean(0)
    torch.testing.assert_close(maps.words["circle"][0, 0, 0].flatten().double(), expected, rtol=1e-4, atol=0)


def test_gradients_are_those_without_maps():
    """And maps hold no graph, which would hold every pass."""
    pipe = Pipeline.demo()
    read, x = pipe.encode(PROMPTS[0], max_sequence_length=16), pipe.noise(1, height=64, width=64).requires_grad_()

    def gradient():
        return torch.autograd.grad(pipe.predict(x, 0.7, [Branch(read)])[0].square().sum(), x)[0]

    plain = gradient()
    with attention_maps(pipe, "circle") as maps:
        assert torch.equal(gradient(), plain)
    assert not maps.words["circle"].requires_grad
    assert not maps.quadrants.requires_grad


def clean(pipe):
    model = pipe.transformer
    attends = [block.attend for block in model.joint_blocks]
    return (
        pipe.watchers == []
        and not model._forward_pre_hooks
        and not any(attend.held or attend._forward_pre_hooks for attend in attends)
    )


def test_nothing_stays_behind(demo):
    def stop(pipe, step, timestep, kwargs):
        assert not clean(pipe)
        raise InterruptedError

    with pytest.raises(InterruptedError), attention_maps(demo, "circle") as maps:
        draw(demo, callback_on_step_end=stop)
    assert clean(demo)
    assert len(maps.passes) == 1
    refuses(lambda: draw_with(demo, "square"), "'square' is not in the prompt", error=ValueError)
    assert clean(demo)


def draw_with(pipe, words, prompts=PROMPTS, **settings):
    with attention_maps(pipe, words, **settings) as maps:
        draw(pipe, prompts)
    return maps


def test_some_blocks_and_steps(demo):
    every = draw_with(demo, "circle")
    some = draw_with(demo, "circle", blocks=(3, 1), steps=1)
    assert some.axes["step"] == [1]
    assert some.axes["block"] == [1, 3]
    expected = every.words["circle"][1:, [1, 3]]
    torch.testing.assert_close(some.words["circle"], expected, rtol=0, atol=0, equal_nan=True)


def test_one_heat_map(both):
    maps = both[0]
    cube = maps.words["circle"]
    torch.testing.assert_close(maps.of("circle"), cube[:, :, :, 0].mean((0, 1, 2)).float())
    torch.testing.assert_close(maps.of("circle", block=2, step=[1], head=(0, 3)), cube[1, 2, [0, 3], 0].mean(0).float())
    torch.testing.assert_close(maps.of("ring", sample=1), maps.words["ring"][:, :, :, 1].mean((0, 1, 2)).float())
    large = maps.upsampled("circle", 96, 128, block=2, smooth=False)
    assert large.shape == (96, 128)
    assert torch.equal(large[::16, ::16], maps.of("circle", block=2))
    smooth = maps.upsampled("circle", 96, 128, block=2)
    assert smooth.shape == (96, 128)
    assert smooth.max() <= large.max()


def test_what_has_no_heat_map(both, demo):
    maps = both[0]
    refuses(lambda: maps.of("ring"), "'ring'", "sample 0", error=ValueError)
    refuses(lambda: maps.of("circle", block=9), "block 9 was not watched; there are 0, 1, 2, 3", error=ValueError)
    refuses(lambda: maps.of("circle", sample=2), "sample 2", error=ValueError)
    refuses(lambda: maps.of("cirle"), "circle", error=ValueError)
    refuses(lambda: draw_with(demo, "circle").of("circle", head=1), 'heads="each"', error=ValueError)
    refuses(lambda: draw_with(demo, "circle").of("circle", encoder="t5"), "i2t, all", error=ValueError)
    with attention_maps(demo, "circle") as empty:
        refuses(lambda: empty.words["circle"], "was not asked for", error=KeyError)
        refuses(lambda: empty.quadrants, "nothing was watched", error=ValueError)
    other = draw_with(demo, "circle", branch="skip")
    refuses(lambda: other.quadrants, "passes of uncond and cond in step 0", error=ValueError)


def test_the_unconditional_branch(demo):
    against = "a green cross"
    with attention_maps(demo, "cross", branch="uncond") as maps:
        draw(demo, PROMPTS[:1], negative_prompt=against)
    with attention_maps(demo, "cross") as other:
        draw(demo, [against], negative_prompt=PROMPTS[0])
    torch.testing.assert_close(maps.words["cross"][0], other.words["cross"][0], rtol=1e-4, atol=1e-7)


def test_blocks_that_a_branch_leaves_out(demo):
    read = demo.encode(PROMPTS[0])
    with attention_maps(demo, "circle", branch="skip") as maps, torch.no_grad():
        demo.predict(demo.noise(1), 0.7, [Branch(read), Branch(read, "skip", (1,))])
    found = maps.words["circle"]
    assert found.shape[:2] == (1, 4)
    assert found.isnan().flatten(2).all(2).tolist() == [[False, True, False, False]]
    assert maps.axes["step"] == [0]
    assert torch.equal(maps.of("circle"), found[0, [0, 2, 3], 0].mean(0))


def test_several_drawings_follow_each_other(demo):
    with attention_maps(demo, "circle") as maps:
        draw(demo, PROMPTS[:1])
        draw(demo, ["a large blue circle"])
        refuses(lambda: draw(demo, PROMPTS[:1], height=64), "4 x 8", "6 x 8", error=ValueError)
    assert maps.axes["step"] == [0, 1, 0, 1]
    alone = draw_with(demo, "circle", ["a large blue circle"])  # whose token stands one place further
    assert torch.equal(maps.words["circle"][2:], alone.words["circle"])


def test_a_call_that_the_pipeline_does_not_know(demo):
    read = demo.encode(PROMPTS[0])
    call = demo.noise(1), torch.tensor([700.0]), read.context, read.pooled
    with attention_maps(demo, "circle"):
        refuses(lambda: demo.transformer(*call), "without pipe.predict", error=RuntimeError)


def test_given_embeddings(demo):
    read = demo.encode(PROMPTS[0])
    embeds = {"prompt_embeds": read.context, "pooled_prompt_embeds": read.pooled, "num_inference_steps": 1}

    def drawn(words):
        with attention_maps(demo, words) as maps:
            demo(seed=1, guidance_scale=1.0, **embeds)
        return maps

    assert drawn(()).quadrants.shape == (1, 4, 4, 1, 4)
    refuses(lambda: drawn("circle"), "embeddings", error=ValueError)


def test_refusals(demo):
    def entered(**settings):
        with attention_maps(demo, "circle", **settings):
            pass

    refuses(lambda: entered(blocks=4), "blocks 0 to 3", error=ValueError)
    refuses(lambda: _several("t2t", DIRECTIONS, "direction"), "unknown direction 't2t'", error=ValueError)
    refuses(lambda: entered(encoder=()), "no encoder", error=ValueError)
    block = demo.transformer.joint_blocks[1]
    kept, block.attend = block.attend, torch.nn.Identity()
    try:
        refuses(entered, "Attend", "Identity", error=TypeError)
        entered(blocks=0)
    finally:
        block.attend = kept
    assert clean(demo)


def test_compiled_models_are_refused():
    pipe = Pipeline.demo()
    pipe.transformer.joint_blocks[2].compile(backend="eager")
    with pytest.raises(ValueError, match=r"joint_blocks.2 is compiled"), attention_maps(pipe, "circle"):
        pass
    blocks = pipe.transformer.joint_blocks
    blocks[2], blocks[0] = Pipeline.demo().transformer.joint_blocks[2], torch.compile(blocks[0], backend="eager")
    with pytest.raises(ValueError, match=r"joint_blocks.0 is compiled"), attention_maps(pipe, "circle"):
        pass


def test_the_second_attention_is_let_be():
    """MMDiT-X without QK-norm, both of which the embedded model lacks."""
    config = MMDiTConfig(2, 128, 32, 16, 8, qk_norm=None, dual_attention_blocks=(0,))
    model = MMDiT(config).double().requires_grad_(False)
    loop = Loop(model, Inputs.random(config, 64, 90, 2, torch.device("cpu"), torch.float64), 2)
    model.pos_embed.normal_()
    plain = loop.run(1)[0]
    with attention_maps(loop, dtype=torch.float64) as maps:
        assert torch.equal(loop.run(1)[0], plain)
        assert model.joint_blocks[0].attend.held
        assert not model.joint_blocks[0].attend2.held
    assert maps.words["word1"].shape == (1, 2, 1, 4, 4)
    assert maps.text == 90


def test_half_precision_storage_and_its_size(demo):
    maps = draw_with(demo, ["circle", "star"], prompts=PROMPTS[:1], dtype=torch.float16, device="cpu")
    assert maps.words["star"].dtype == torch.float16
    masses = 2 * 4 * 4 * 4 * 4  # steps, blocks, heads, quadrants, bytes
    assert maps.nbytes == 2 * 4 * 2 * 48 * 2 + masses
    assert "2 passes, 4 blocks, 6 x 8 patches" in repr(maps)
