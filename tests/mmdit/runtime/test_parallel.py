"""Several ranks compute what one computes, and a fault on one of them ends all. CPU processes over gloo, forked."""

import atexit
import gc
import os
import signal
import socket
import time
import weakref
from contextlib import contextmanager
from copy import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import mmdit
from encoders import VAE, Conditioning
from encoders.vae import VAEConfig
from full import FULL
from mmdit.checkpoints.load_pipeline import Components
from mmdit.models.attention import Attend
from mmdit.models.controlnet import ControlNet, ControlNetConfig
from mmdit.models.lora import beside
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.control import Control
from mmdit.runtime import bands, mesh
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.bands import BandDecoder, decode_in_bands
from mmdit.runtime.compiled import refuse_compiled
from mmdit.runtime.fast_nets import ActingNet
from mmdit.runtime.fast_vae import FastVAE, plain_norm
from mmdit.runtime.graphs import Graphs
from mmdit.runtime.lifeline import DIED, Lifeline, ParallelError
from mmdit.runtime.mesh import Layout, Team, layout_of, shares
from mmdit.runtime.plan import smallest
from mmdit.runtime.sequence import SequenceParallel, exchanged_bytes
from processes import in_processes, values
from quant.quantize import quantize_
from quant.recipe import RECIPES
from skips import SKIPS
from triton_device import HAS_TRITON, quiet

if HAS_TRITON:
    from mmdit.runtime.vae_kernels import band_message, norm_band

CAPTURE = mmdit.capture  # imported here once, not in every process
HEADS, WIDTH = 5, 16
SIZES = {"depth": 3, "hidden_size": HEADS * WIDTH, "context_dim": 256, "pooled_dim": 192, "pos_embed_size": 16}
VARIANTS = {
    "large": mmdit.MMDiTConfig(**SIZES, head_dim=WIDTH, sample_size=8),
    "mmdit-x": mmdit.MMDiTConfig(**SIZES, head_dim=WIDTH, sample_size=8, dual_attention_blocks=(0, 1)),
    "sd3-medium": mmdit.MMDiTConfig(**SIZES, head_dim=WIDTH, sample_size=8, qk_norm=None),
}
ANY = {"progress": False, "output_type": "latent", "num_inference_steps": 2, "guidance_scale": 4.5, "seed": 3}
CASES = {
    "guided": {},
    "not guided": {"guidance_scale": 1.0},
    "a layer skipped": {"skip_guidance_layers": [1]},
    "the first layer skipped": {"skip_guidance_layers": [0]},
    "perturbed attention": {"guidance": mmdit.Guidance(perturbed_layers=(1,))},
    "skipped and perturbed": {"skip_guidance_layers": [1], "guidance": mmdit.Guidance(perturbed_layers=(0, 2))},
    "adaptive projected guidance": {"guidance": mmdit.Guidance(kind="apg", momentum=-0.5)},
    "CFG-Zero*": {"guidance": mmdit.Guidance(kind="zero_star")},
    "CFG++": {"sampler": "euler_cfg_pp"},
    "two predictions a step": {"sampler": "heun"},
    "random steps": {"sampler": "euler_ancestral"},
    "several pictures": {"num_images_per_prompt": 3},
    "an odd size": {"height": 80, "width": 112},
}
FEW = ("guided", "perturbed attention", "an odd size")
SPLIT_BRANCHES = [
    f"mmdit-x, {name}"
    for name in ("adaptive projected guidance", "CFG-Zero*", "CFG++", "two predictions a step", "random steps")
]
ON_FOUR = {
    Layout(2, 2): (
        "large, an odd size",
        *(["large, single-stream ControlNet"] if FULL else []),  # two ranks draw it in either layout
        "mmdit-x, skipped and perturbed",
        "mmdit-x, joint ControlNet",
        "mmdit-x, fast, several pictures",
        "decoding",
    ),
    Layout(1, 4): (
        "large, guided",
        "sd3-medium, perturbed attention",
        "mmdit-x, an odd size",
        *(["mmdit-x, several pictures", "mmdit-x, joint ControlNet"] if FULL else []),  # the same
        "sd3-medium, fast, an odd size",
    ),
    Layout(4, 1): ("mmdit-x, skipped and perturbed", "mmdit-x, random steps"),
}
# What two ranks draw with MMDIT_FULL=1 only: the MMDiT-X draws it on two, and these variants on four.
MORE = [f"{name}, {case}" for name in ("large", "sd3-medium") for case in ("perturbed attention", "an odd size")]
MORE += [f"sd3-medium, fast, {case}" for case in ("several pictures", "an odd size", "the first layer skipped")]
LAYOUTS = {2: [Layout(2, 1), Layout(1, 2)], 4: [Layout(2, 2), Layout(1, 4), Layout(4, 1)]}


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * (
            0.1 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
        )
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pipes():
    """Pipelines in float64 with random transformers, by variant, and without text encoders."""
    found, demo = {}, mmdit.Pipeline.demo(dtype=torch.float64)
    demo.clip_l = demo.clip_g = demo.t5 = None
    for name, config in VARIANTS.items():
        pipe = copy(demo)
        pipe.transformer = randomized(MMDiT(config))
        found[name] = pipe
    found["lora"] = copy(demo)
    found["lora"].transformer = randomized(MMDiT(VARIANTS["mmdit-x"]))
    low = torch.randn(2, HEADS * WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for name in ("joint_blocks.1.x_block.attn.proj", "joint_blocks.1.context_block.attn.proj"):
        beside(found["lora"].transformer, name, factors=(low, low.t()))
    return found


@pytest.fixture(scope="module")
def texts():
    draw = torch.Generator().manual_seed(1)
    return [
        Conditioning(
            torch.randn(1, 7, 256, generator=draw, dtype=torch.float64),
            torch.randn(1, 192, generator=draw, dtype=torch.float64),
        )
        for _ in range(2)
    ]


def nets():
    """ControlNets of both kinds."""
    common = {"hidden_size": HEADS * WIDTH, "pooled_dim": 192, "head_dim": WIDTH}
    configs = {
        "single-stream ControlNet": ControlNetConfig(depth=2, **common),
        "joint ControlNet": ControlNetConfig(depth=2, context_dim=256, pos_embed_size=16, **common),
    }
    return {name: randomized(ControlNet(config), 2) for name, config in configs.items()}


def draw(pipe, texts, options=None, control=()):
    cond, uncond = ([mmdit.Ranged(text, control=control)] for text in texts)
    return pipe(cond, uncond, **(ANY | (options or {}))).images


def near(found, wanted):
    """The relative error."""
    return float((found - wanted).norm() / wanted.norm())


def drawings(pipes, texts):
    """What is compared: functions that draw, by name."""
    hint = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = {}

    def add(name, variant, options, control=(), fast=False):
        def drawn():
            pipe = pipes[variant]
            if fast:
                pipe.accelerate()
            try:
                return draw(pipe, texts, options, control)
            finally:
                pipe.plain()

        found[f"{variant}, {name}"] = drawn

    for name, options in CASES.items():
        add(name, "mmdit-x", options)
    for variant in ("large", "sd3-medium"):
        for name in FEW:
            add(name, variant, CASES[name])
    for (name, net), variant in zip(nets().items(), ("large", "mmdit-x"), strict=True):
        for fast in ("", "fast, "):
            add(fast + name, variant, {}, (Control(net, hint, hint),), fast=bool(fast))
    add("plain", "lora", {})
    add("fast", "lora", {}, fast=True)
    for variant in ("mmdit-x", "sd3-medium"):
        for name in ("several pictures", "an odd size", "the first layer skipped"):
            add(f"fast, {name}", variant, CASES[name], fast=True)
    latent = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found["decoding"] = lambda: pipes["large"].decode(latent)
    return found


@contextmanager
def parallel(every, layout):
    ends = [mmdit.parallelize(pipe, *layout) for pipe in every]
    try:
        yield
    finally:
        for one in ends:
            one.close()


def cases_of(layout, every):
    """All on two ranks, but those that differ in the sampler alone only with split branches; some on four."""
    if layout in ON_FOUR:
        return ON_FOUR[layout]
    left = () if FULL else MORE
    return [name for name in every if name not in left and (layout.cfg > 1 or name not in SPLIT_BRANCHES)]


@pytest.fixture(scope="module")
def drawn(pipes, texts):
    """Relative errors of what two and four ranks draw, by number of ranks, layout and case; one group for all."""
    every = drawings(pipes, texts)
    asked = {name for layouts in LAYOUTS.values() for layout in layouts for name in cases_of(layout, every)}
    wanted = {name: one() for name, one in every.items() if name in asked}
    for name in ("large, single-stream ControlNet", "mmdit-x, joint ControlNet"):
        assert near(wanted[name], wanted[f"{name.split(',')[0]}, guided"]) > 1e-3, "the net changes nothing"
    assert near(wanted["lora, plain"], wanted["mmdit-x, guided"]) > 1e-3, "the LoRA changes nothing"

    def work(world):
        found = {}
        for layout in LAYOUTS[world]:
            cases = cases_of(layout, every)
            with parallel(pipes.values(), layout):
                found[layout] = {name: near(every[name](), wanted[name]) for name in cases}
        return found

    return {world: values(in_processes(world, lambda rank, world=world: work(world))) for world in LAYOUTS}


@pytest.mark.parametrize("layout", [one for layouts in LAYOUTS.values() for one in layouts], ids=str)
def test_every_rank_draws_what_one_process_draws(drawn, layout):
    for rank, found in enumerate(drawn[layout.cfg * layout.sequence]):
        errors = found[layout]
        on_two = {(2, 1): 32, (1, 2): 27} if FULL else {(2, 1): 25, (1, 2): 20}
        assert len(errors) == on_two.get(layout, len(ON_FOUR.get(layout, ())))
        assert {name: error for name, error in errors.items() if not error < 1e-10} == {}, f"rank {rank}"


@pytest.mark.parametrize("layout", [Layout(2, 1), Layout(1, 2)], ids=str)
def test_each_rank_keeps_a_budget(pipes, texts, layout):
    """Blocks are streamed on both ranks, and a picture that one of them decodes in tiles is decoded so on both."""
    demo, vae = pipes["mmdit-x"], randomized(VAE(VAEConfig((8, 8, 8, 8), blocks_per_level=1, groups=4)))
    parts = Components(randomized(MMDiT(VARIANTS["mmdit-x"])), vae, None, None, None, demo.tokenizers, 3.0)
    pipe = mmdit.Pipeline(parts, memory="100GB", device="cpu")
    latent = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    tiled = pipe.decode(latent, tile=64)
    wanted = [draw(pipe, texts), draw(pipe, texts, CASES["an odd size"])]
    wanted += [wanted[0], tiled]
    found = pipe.memory_plan
    pipe._set_budget(smallest(found.models, found.activations).sum)

    def work(rank):
        mmdit.parallelize(pipe, *layout)
        drawn = [draw(pipe, texts), draw(pipe, texts, CASES["an odd size"])]
        assert pipe.memory_plan.streamed
        pipe._set_budget(10**9)
        pipe.accelerate()
        drawn.append(draw(pipe, texts))
        pipe.plain()
        if rank:
            fits = pipe._fit_vae
            pipe._fit_vae = lambda *given, **more: (fits(*given, **more), 64)[1]
        drawn.append(pipe.decode(latent))
        return list(map(near, drawn, wanted))

    for errors in values(in_processes(2, work)):
        assert all(error < 1e-10 for error in errors), errors


def test_a_budget_that_is_too_small_on_one_rank_is_refused_on_both(pipes, texts):
    demo = pipes["large"]
    parts = Components(randomized(MMDiT(VARIANTS["large"])), demo.vae, None, None, None, demo.tokenizers, 3.0)
    pipe = mmdit.Pipeline(parts, memory="100GB", device="cpu")
    wanted = draw(pipe, texts)

    def work(rank):
        mmdit.parallelize(pipe, 2, 1)
        if rank:
            pipe._budget, pipe.memory_plan = 1000, None
        with pytest.raises(MemoryError if rank else mmdit.ParallelError, match=r"too small: the smallest plan"):
            draw(pipe, texts)
        pipe._budget = 10**11
        return near(draw(pipe, texts), wanted)

    assert all(error < 1e-10 for error in values(in_processes(2, work)))


def test_decoding_in_bands():
    """Several pictures, uneven bands, fewer rows than ranks, and parts of a batch; also by the fast VAE's layers."""
    vae = randomized(VAE(VAEConfig((32, 64), latent_channels=4, blocks_per_level=1, groups=8)))
    draw = torch.Generator().manual_seed(8)
    latents = [torch.randn(2, 4, rows, 3, generator=draw, dtype=torch.float64) for rows in (5, 2)]
    wanted = [vae.decode(latent) for latent in latents]

    def work(rank):
        team, fast = Team(dist.group.WORLD), FastVAE(vae, plain_norm)
        bands.WORTH = 0
        found = [[decode_in_bands(vae, latent, team, how) for latent in latents] for how in (None, fast)]
        bands.WHOLE = 5 * 3 * 4 // 3  # pixels of a picture on a rank
        found.append([decode_in_bands(vae, latent, team) for latent in latents])
        return [near(one, other) for each in found for one, other in zip(each, wanted, strict=True)]

    for errors in values(in_processes(3, work)):
        assert max(errors) < 1e-12


class Recorder(Graphs):
    """Graphs that launch every time; `fails` stands for what a recording may run into."""

    fails = lacks = False

    def __call__(self, key, step, inputs):
        if self.lacks:
            try:
                raise torch.OutOfMemoryError("of this rank")
            finally:  # as a recording that ends
                raise RuntimeError("the recording failed")
        if self.fails:
            raise RuntimeError("not permitted\nwhile recording")
        self._captured[key] = self._captured.get(key, 0) + 1
        return step(*inputs)


def test_bands_are_recorded_the_second_time_and_anew_after_a_change(monkeypatch):
    vae = randomized(VAE(VAEConfig((8, 16), latent_channels=4, blocks_per_level=1, groups=4)))
    latent = torch.randn(1, 4, 5, 3, dtype=torch.float64)
    monkeypatch.setattr(bands, "WORTH_GRAPH", 0)
    monkeypatch.setattr(bands, "Graphs", Recorder)

    def work(rank):
        decoder, fast, found = BandDecoder(Team(dist.group.WORLD)), FastVAE(vae, plain_norm), []

        def decoded(graph=True):
            found.append(near(decoder(vae, latent, fast, graph=graph), fast.decode(latent)))
            return list(decoder.graphs._captured.values())

        counts = [decoded(), decoded(), decoded(), decoded(graph=False)]
        vae.decoder.conv_out.weight.data = vae.decoder.conv_out.weight * 2
        counts += [decoded(), decoded()]
        decoder.close()
        decoded()
        decoder.graphs.lacks = True
        with pytest.raises(RuntimeError, match="recording failed"):  # others may have succeeded, so nothing else is run
            decoded()
        decoder.close()
        decoder.graphs.lacks, decoder.graphs.fails = False, True
        counts += [decoded(), decoded(), decoded()]
        return max(found), counts, decoder.why_not

    for error, counts, why in values(in_processes(2, work)):
        assert error < 1e-12
        assert counts == [[], [1], [2], [2], [], [1], [], [], []]
        assert why == "not permitted"


@pytest.mark.skipif(not HAS_TRITON, reason=SKIPS["triton"])
@pytest.mark.parametrize("rows", [(3, 2, 2), (1, 1), (4, 4)], ids=str)
def test_kernels_of_bands(rows):
    """Ranks norm their rows and the adjacent ones under the moments of all, by what they tell each other."""
    norm = randomized(torch.nn.GroupNorm(4, 8, eps=1e-6)).float()
    x = 30 + torch.randn(2, 8, sum(rows), 5, generator=torch.Generator().manual_seed(5))
    x = x.contiguous(memory_format=torch.channels_last)
    wanted, starts = torch.nn.functional.silu(norm(x)), mesh.starts(rows)
    parts = [one.contiguous(memory_format=torch.channels_last) for one in x.split(rows, dim=2)]
    with quiet():
        messages = torch.stack([band_message(one, 4) for one in parts])
        for rank, (part, start, count) in enumerate(zip(parts, starts, rows, strict=True)):
            found = norm_band(norm, part, messages, rank, rows)
            there = wanted[:, :, max(start - 1, 0) : start + count + 1]
            torch.testing.assert_close(found, there, rtol=1e-5, atol=1e-4)


def test_branches_of_guidance_are_split_to_the_last_bit(pipes, texts):
    """Each rank runs its branch alone, as one process does with a pass for each branch."""
    pipe = copy(pipes["mmdit-x"])
    pipe.transformer = copy_of(pipe.transformer).float()
    options = {"guidance": mmdit.Guidance(sequential=True)}
    wanted = draw(pipe, texts, options)

    def work(rank):
        with parallel([pipe], Layout(2, 1)):
            return torch.equal(draw(pipe, texts), wanted)

    assert values(in_processes(2, work)) == [True, True]


def test_float32_and_float8(pipes, texts):
    """Float32 to 1e-6; float8 codes are those of one process where each token has its own scale."""
    plain = copy_of(pipes["large"].transformer).float()
    eighth = copy_of(plain)
    quantize_(eighth, RECIPES["fp8"])
    latent = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(6))
    text = texts[0].to("cpu", torch.float32)
    inputs = latent, torch.tensor([500.0]), text.context, text.pooled
    wanted, wanted8 = plain(*inputs), eighth(*inputs)
    tokens = torch.randn(1, 15, HEADS * WIDTH)
    linear = eighth.joint_blocks[0].x_block.attn.qkv

    def work(rank):
        sequence = SequenceParallel(Team(dist.group.WORLD))
        own = sequence.part(15).own(tokens)
        whole = sequence.part(15).whole(linear(own))
        errors = [
            near(sequence.velocity(model, *inputs), found) for model, found in ((plain, wanted), (eighth, wanted8))
        ]
        return errors, torch.equal(whole, linear(tokens))

    for (error, error8), equal in values(in_processes(2, work)):
        assert error < 1e-6
        assert error8 < 1e-2
        assert equal


def test_an_accelerated_model_with_a_net_is_shared(pipes, texts):
    """The net too computes the tokens of its rank from then on, and all of them afterwards."""
    model, (text, _) = pipes["large"].transformer, texts
    latent = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    net = ActingNet(nets()["joint ControlNet"], (latent.flip(-1),), 500.0, 1.0, (0, 0, 1))
    fast = Accelerated(model)

    def velocity():
        return fast.velocity(latent, 500.0, [text.context], [text.pooled], nets=(net,))

    wanted = velocity()

    def work(rank):
        errors = []
        for sequence in (SequenceParallel(Team(dist.group.WORLD)), None):
            fast.share(sequence)
            errors.append(near(velocity(), wanted))
        return errors

    for errors in values(in_processes(2, work)):
        assert max(errors) < 1e-10
    fast.close()


def test_ten_ten_nine_and_nine_heads():
    """The heads of SD3.5-Large on four ranks, with and without text, several samples, and tokens that do not divide."""
    draw = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(2, 5 + 23, 38, 4, generator=draw, dtype=torch.float64) for _ in range(3))

    def attention(q, k, v):
        return Attend()(*(one.transpose(1, 2) for one in (q, k, v))).transpose(1, 2)

    def work(rank):
        team = Team(dist.group.WORLD)
        part, errors = SequenceParallel(team).part(23), []
        text = part.own_text(torch.arange(5)[None, :, None])[0, :, 0]
        image = 5 + part.own(torch.arange(23)[None, :, None])[0, :, 0]
        for samples, rows, first in ((1, torch.cat([text, image]), 0), (2, torch.cat([text, image]), 0), (2, image, 5)):
            wanted = attention(*(one[:samples, first:] for one in (q, k, v)))[:, rows - first]
            errors.append(near(part.attend(*(one[:samples, rows] for one in (q, k, v)), attention), wanted))
        before = team.sent
        part.attend(*[torch.zeros(1, len(text) + part.size, 38, 4)] * 3, attention)
        return errors, team.sent - before, part.size, len(text)

    found = values(in_processes(4, work))
    assert shares(38, 4) == [10, 10, 9, 9]
    assert all(error < 1e-12 for errors, *_ in found for error in errors)
    sizes = {"tokens": 23, "text": 5, "heads": 38, "head_dim": 4}
    assert found[0][1] == exchanged_bytes(**sizes, depth=1, second=0, ranks=4, itemsize=4)
    assert [sizes for _, _, *sizes in found] == [[6, 1], [6, 1], [6, 1], [5, 2]]


FAULTS = {
    "killed": f"rank 1 failed: {DIED}",
    "an error in a layer": "rank 1 failed: OverflowError: in a layer",
    "an error between exchanges": "rank 1 failed: OverflowError: of the callback",
    "a drawing less": "rank 1 has ended after",
}


@pytest.fixture(scope="module")
def faults(pipes, texts):
    """How both ranks end, by layout and fault."""
    pipe = pipes["large"]

    def stop(*_):
        raise OverflowError("of the callback")

    def work(rank, layout, fault):
        mmdit.parallelize(pipe, *layout)
        odd, options = rank == 1, {}
        if odd and fault in ("killed", "an error in a layer"):
            pipe.transformer.joint_blocks[1].register_forward_pre_hook(killed if fault == "killed" else broken)
        if odd and fault == "an error between exchanges":
            options["callback_on_step_end"] = stop
        draw(pipe, texts, options)
        if fault == "a drawing less" and odd:
            pipe.parallel.close()
        else:
            draw(pipe, texts, options)

    def run(layout, fault):
        return in_processes(2, lambda rank: work(rank, layout, fault), limit=30)

    return {(layout, fault): run(layout, fault) for fault in FAULTS for layout in FAULT_LAYOUTS[fault]}


FAULT_LAYOUTS = {
    fault: [Layout(2, 1), Layout(1, 2)] if fault in ("killed", "an error in a layer") else [Layout(2, 1)]
    for fault in FAULTS
}


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def broken(*_):
    raise OverflowError("in a layer")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_one_rank_ends_every_rank(faults, fault):
    for layout in FAULT_LAYOUTS[fault]:
        first, second = faults[layout, fault]
        assert first.code == 1
        assert FAULTS[fault] in first.error
        assert second.code == (0 if fault == "a drawing less" else -9 if fault == "killed" else 1)
        if second.code == 1:
            assert second.error.startswith("OverflowError")
        assert first.seconds < 20


def test_calls_that_differ_are_refused_on_every_rank_which_can_then_draw(pipes, texts):
    pipe = pipes["large"]
    wanted = draw(pipe, texts)

    def refused(kind, given, options):
        try:
            draw(pipe, given, options)
        except kind as error:
            return str(error)

    def work(rank):
        with parallel([pipe], Layout(2, 1)):
            said = [
                refused(mmdit.RanksDifferError, texts[::-1] if rank else texts, {}),
                refused(mmdit.RanksDifferError, texts, {"seed": rank}),
                refused(mmdit.RanksDifferError, texts, {"num_inference_steps": 2 + rank}),
                refused(ValueError if rank else mmdit.ParallelError, texts, {"height": 80 + rank}),
            ]
            return said, near(draw(pipe, texts), wanted)

    for rank, (said, error) in enumerate(values(in_processes(2, work))):
        names = "prompt differs", "seed differs", "sigmas differs", "81" if rank else "rank 1 refused its arguments"
        assert all(name in one for name, one in zip(names, said, strict=True)), said
        assert error < 1e-10


def test_arguments_that_every_rank_refuses_are_let_go_of(pipes):
    class Held:
        pass

    def work(rank):
        held, gone = Held(), []
        weakref.finalize(held, gone.append, True)

        def make(held=held):
            raise ValueError("refused")

        with parallel([pipes["large"]], Layout(1, 1)):
            gc.disable()
            with pytest.raises(ValueError, match="refused"):
                pipes["large"].parallel.agreed(make, "nothing", dict)
            del make, held
        return gone

    assert values(in_processes(1, work)) == [[True]]


def test_an_interrupt_before_ranks_agree_ends_every_rank(pipes):
    def work(rank):
        def facts_of(made):
            if rank == 1:
                raise KeyboardInterrupt
            return {}

        mmdit.parallelize(pipes["large"], 2, 1)
        pipes["large"].parallel.agreed(int, "numbers", facts_of)

    first, second = in_processes(2, work, limit=10)
    assert "rank 1 failed: KeyboardInterrupt" in first.error
    assert second.error.startswith("KeyboardInterrupt")


def test_random_seeds_and_noise_are_those_of_the_first_rank(pipes, texts):
    pipe = copy(pipes["large"])
    draws = []
    pipe._noise_ahead = lambda *given: (draws.append(given), type(pipe)._noise_ahead(pipe, *given))[1]

    def work(rank):
        torch.manual_seed(rank)
        with parallel([pipe], Layout(2, 1)):
            first = pipe([mmdit.Ranged(texts[0])], **(ANY | {"seed": None, "guidance_scale": 1.0}))
            *_, last = pipe.sample(texts[0], None, pipe.noise(), num_inference_steps=2, guidance_scale=1.0)
            return first.images, last.x, len(draws)

    one, two = values(in_processes(2, work))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert (one[2], two[2]) == (1, 0)


def test_each_encoder_runs_on_one_rank():
    """Both dtypes of the rules, prompts with weights, a missing encoder, and two batches of prompts at once."""
    pipe, prompts = mmdit.Pipeline.demo(), ["a (red:1.3) circle", "a blue square left of a green triangle"]
    wide = replace(pipe.profile, text=replace(pipe.profile.text, encoder_dtype="float32", missing_clip="zeros"))
    without = copy(pipe)
    without.clip_g = None

    def encoded():
        found = []
        for one, profile in ((pipe, pipe.profile), (pipe, wide), (without, wide)):
            one.profile = profile
            found += [one.encode(prompts, max_sequence_length=16), *one._encode_each([prompts[:1], [""]], 16)]
        return found

    wanted = encoded()

    def work(rank):
        ran = []
        for name in ("clip_l", "clip_g", "t5"):
            getattr(pipe, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        with parallel([pipe, without], Layout(3, 1)):
            pairs = zip(encoded(), wanted, strict=True)
            equal = [torch.equal(a.context, b.context) and torch.equal(a.pooled, b.pooled) for a, b in pairs]
            pipe.encode(prompts, max_sequence_length=16)
        return equal, ran[-1], len(ran)

    equal, last, counts = zip(*values(in_processes(3, work)), strict=True)
    assert all(map(all, equal))
    assert {*last} == {"clip_l", "clip_g", "t5"}
    assert sum(counts) == 3 * (3 + 3 + 2) + 3, "each encoder once for each of three batches, and three at the end"


@pytest.mark.parametrize(
    ("world", "arguments", "said"),
    [
        (2, (2, 2), "cfg 2 x sequence 2 is a mesh of 4 processes, and 2 are running"),
        (4, (3, None), "cfg 3 x sequence 1 is a mesh of 3 processes, and 4 are running"),
        (6, (1, 6), "sequence 6: the model has 5 attention heads"),
        (2, (0, 1), "cfg must be a whole number of at least 1, got 0"),
        (2, ("both", 1), "'both'"),
    ],
)
def test_a_mesh_that_does_not_fit(world, arguments, said, as_users_run_it):
    with pytest.raises(ValueError, match=said):
        layout_of(world, *arguments, guided=True, heads=5)


def test_layouts_that_are_chosen():
    choose = {"heads": 38}
    assert layout_of(2, "auto", None, guided=True, **choose) == (2, 1)
    assert layout_of(2, "auto", None, guided=False, **choose) == (1, 2)
    assert layout_of(8, "auto", None, guided=True, **choose) == (2, 4)
    assert layout_of(3, "auto", None, guided=True, **choose) == (1, 3)
    assert layout_of(4, 1, None, guided=True, **choose) == (1, 4)


def test_a_mesh_that_does_not_fit_is_refused_on_every_rank(pipes):
    def work(rank):
        with pytest.raises(mmdit.RanksDifferError, match="sequence differs"):
            mmdit.parallelize(pipes["large"], 1, 2 - rank)
        with pytest.raises(mmdit.RanksDifferError, match="weights differs"):
            mmdit.parallelize(pipes[("large", "sd3-medium")[0]] if not rank else changed(pipes["large"]), 2)
        mmdit.parallelize(pipes["large"], 3)

    for one in in_processes(2, work):
        assert one.code == 1
        assert "ValueError: cfg 3 x sequence 1 is a mesh of 3 processes, and 2 are running" in one.error


def changed(pipe):
    other = copy(pipe)
    other.transformer = copy_of(pipe.transformer)
    other.transformer.joint_blocks[0].x_block.attn.qkv.weight.data.zero_()
    other._digest = None
    return other


def test_processes_that_torchrun_has_not_started(pipes, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        mmdit.parallelize(pipes["large"])


def test_what_looks_inside_refuses_a_parallel_pipeline(pipes):
    pipe = pipes["large"]

    def work(rank):
        with parallel([pipe], Layout(2, 1)):
            with pytest.raises(ValueError, match="parallel"), CAPTURE(pipe, "joint_blocks.1.*"):
                pass
            with pytest.raises(ValueError, match="parallel already"):
                mmdit.parallelize(pipe, 2)
            with pytest.raises(ValueError, match="is parallel"):
                pipe.to(torch.float32)
        refuse_compiled(pipe.transformer, "the transformer")
        return pipe.parallel is None

    assert values(in_processes(2, work)) == [True, True]


def test_a_rank_that_is_stuck_is_ended(pipes):
    """A process whose main thread cannot be freed ends by itself, after the grace."""

    def work(rank):
        life = Lifeline.connected(rank, 2, mesh.from_first, grace=0.2)
        with life.guarded():
            dist.barrier()
            if rank:
                raise OverflowError("in a layer")
            time.sleep(30)

    first, second = in_processes(2, work, limit=15)
    assert first.code == 1
    assert first.value is None
    assert first.error == ""  # it had no chance to raise
    assert second.error.startswith("OverflowError")


def test_a_process_exits_after_everything_is_freed(monkeypatch):
    """Torch aborts a process that exits while another thread aborts its collectives."""
    at_exit, done = [], []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(atexit, "unregister", at_exit.remove)
    other, own = socket.socketpair()
    life = Lifeline(1, {0: own}, on_failure=lambda: (time.sleep(0.2), done.append(True)))
    with pytest.raises(ParallelError, match="rank 0 failed: OverflowError"), life.guarded():
        other.sendall(b'{"failed": 0, "reason": "OverflowError: in a layer"}\n')
        while True:
            life.check()
            time.sleep(0.01)
    other.close()
    life.close()
    at_exit[0]()
    assert done == [True]


def copy_of(model):
    """A copy with tensors of its own."""
    other = type(model)(model.config).to(model.pos_embed.dtype)
    other.load_state_dict(model.state_dict())
    return other.eval().requires_grad_(False)


@pytest.mark.skipif(not FULL, reason=SKIPS["full"])
def test_eight_ranks():
    """Two branches over two times four ranks, with 10 + 10 + 9 + 9 heads, on eight processes."""
    pipe = copy(mmdit.Pipeline.demo(dtype=torch.float64))
    config = SIZES | {"hidden_size": 38 * 8}
    pipe.transformer = randomized(MMDiT(mmdit.MMDiTConfig(**config, head_dim=8, sample_size=8)))
    options = ANY | {"height": 80, "width": 112}
    wanted = pipe("a red circle", **options).images

    def work(rank):
        found = []
        for layout in (Layout(2, 4), Layout(1, 8), Layout(2, 4)):
            with parallel([pipe], layout):
                found.append(near(pipe("a red circle", **options).images, wanted))
        return found

    assert max(max(errors) for errors in values(in_processes(8, work, limit=120))) < 1e-10
