"""The training of the embedded model: its parts against closed forms and the library, and a dry run of all of it."""

import random
from collections import Counter
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, nn

from encoders import Conditioner, TextRules
from encoders.clip import CLIPConfig, CLIPText
from encoders.t5 import T5Config, T5Encoder
from encoders.vae import VAE, VAEConfig
from mmdit.checkpoints.load import load_vae
from mmdit.demo import evaluate, recipe, train, trainee
from mmdit.demo.captions import CaptionStyle, inventory
from mmdit.demo.data import LENGTH, TokenTable, make_dataset, own_tokenizers, tokenize
from mmdit.demo.export import PIECE, write_pieces
from mmdit.demo.progress import save_whole
from mmdit.demo.recipe import FULL, Architecture, T5Mix
from mmdit.demo.run import Run
from mmdit.demo.train_mmdit import (
    Batch,
    Batches,
    Engine,
    draw_form,
    flow_loss,
    make_optimizer,
    mean_gradients,
    train_mmdit,
)
from mmdit.demo.train_vae import fold_scale, vae_loss
from mmdit.demo.vocab import SIZE
from mmdit.embedded import EMBEDDED
from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline.pipeline import Pipeline
from mmdit.training.ema import Ema
from mmdit.training.journal import Journal, Unwritten
from mmdit.training.rates import Budget, learning_rate
from processes import in_processes, values
from samplers.training import noised
from skips import SKIPS

TINY = Architecture(
    MMDiTConfig(depth=2, hidden_size=64, context_dim=256, pooled_dim=192, pos_embed_size=32, sample_size=16),
    VAEConfig(widths=(32, 32, 32, 32), blocks_per_level=1),
    CLIPConfig(width=64, layers=2, mlp_dim=64, activation="quick_gelu", heads=1, vocabulary=SIZE),
    CLIPConfig(width=128, layers=2, mlp_dim=64, activation="gelu", heads=2, vocabulary=SIZE, projection_dim=128),
    T5Config(width=256, layers=1, heads=4, head_dim=64, mlp_dim=64, vocabulary=SIZE),
)
CAPTIONS = ["a red circle above a blue square on a white background", "", "two small pink stars, navy background"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Inline(Executor):
    """A pool that works in this process."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **named))
        return future


def run_of(changed: recipe.TrainingRecipe, folder: Path) -> Run:
    return Run(changed, torch.device("cpu"), folder, Journal(folder), Inline(), 60.0)


def randomized(model: nn.Module) -> None:
    """Nothing stays at zero, so that every input shows in the output."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))


def test_rate_follows_warm_up_and_elapsed_time() -> None:
    def rate(fraction: float, step: int = 10_000) -> float:
        return learning_rate(fraction, step, peak=2.0, warmup=100, decay=0.3)

    assert rate(0.0, step=0) == pytest.approx(0.02)
    assert rate(0.1, step=49) == pytest.approx(1.0)
    assert rate(0.7) == pytest.approx(2.0)
    assert rate(0.85) == pytest.approx(1.0)
    assert rate(1.0) == 0.0


def test_budget_ends_by_time_or_steps_and_goes_on_from_where_it_was() -> None:
    clock = Clock()
    budget = Budget(10.0, clock=clock)
    seen = []
    for step, fraction in budget.rounds():
        seen.append((step, fraction))
        clock.now += 4.0
    assert seen == [(0, 0.0), (1, 0.4), (2, 0.8)]
    assert [step for step, _ in Budget(10.0, steps=3, clock=Clock()).rounds()] == [0, 1, 2]
    resumed = Budget(10.0, done=0.5, clock=clock)
    clock.now += 5.0
    assert resumed.fraction(0) == 0.75
    with pytest.raises(ValueError, match="seconds > 0"):
        Budget(0.0)


def test_a_state_is_saved_whole_and_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, path = tmp_path / "victim", tmp_path / "run" / "mmdit.pt"
    victim.write_text("kept")
    path.parent.mkdir()
    (path.parent / "mmdit.pt.part").symlink_to(victim)
    save_whole({"step": 1}, path)
    assert victim.read_text() == "kept"
    assert torch.load(path) == {"step": 1}

    def full(value: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_whole({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    assert {file.name for file in path.parent.iterdir()} == {"mmdit.pt", "mmdit.pt.part"}


def test_ema_is_the_weighted_mean_and_comes_back_from_its_state() -> None:
    model = nn.Linear(2, 1, bias=False)
    ema = Ema(model, decay=0.5)
    expected = model.weight.detach().clone()
    for n in range(1, 30):
        with torch.no_grad():
            model.weight.normal_()
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    other = Ema(nn.Linear(2, 1, bias=False), decay=0.5)
    other.load_state_dict(ema.state_dict())
    into = nn.Linear(2, 1, bias=False)
    other.write_to(into)
    torch.testing.assert_close(into.weight.detach(), expected)
    assert other.updates == 29


def test_a_number_that_is_not_finite_stops_the_run_after_it_is_logged(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(FloatingPointError, match="loss"):
        journal.row("mmdit", loss=float("nan"), step=3)
    assert '"step": 3' in (tmp_path / "progress.jsonl").read_text()


def test_data_is_the_same_for_the_same_seed_and_captions_belong_to_their_scenes() -> None:
    one, again, other = (make_dataset(5, 2, seed, Inline())() for seed in (1, 1, 2))
    assert torch.equal(one.tokens.t5, again.tokens.t5)
    assert torch.equal(one.scenes.x, again.scenes.x)
    assert not torch.equal(one.scenes.x, other.scenes.x)
    assert one.tokens.t5.shape == (10, LENGTH)
    t5 = own_tokenizers().t5
    assert t5 is not None
    for i, scene in enumerate(one.scenes.words()):
        for row in one.tokens.t5[2 * i : 2 * i + 2].tolist():
            text = " ".join(t5.backend.id_to_token(token) for token in row)
            assert all(thing.shape in text and thing.colour in text for thing in scene.objects)


def test_odds_of_objects_and_style_of_captions_are_those_asked_for() -> None:
    style = CaptionStyle(inventory=1.0)
    data = make_dataset(400, 1, 3, Inline(), style, (0.0, 0.1, 0.2, 0.7))()
    shares = torch.bincount(data.scenes.count, minlength=5)[1:] / 400
    assert shares.tolist() == pytest.approx([0.0, 0.1, 0.2, 0.7])
    texts = [inventory(scene) for scene in data.scenes[:8].words()]
    assert torch.equal(data.tokens.t5[:8], tokenize(texts).t5)


@pytest.mark.parametrize("form", ["short", "long", "zeros", "omitted"])
def test_training_reads_text_exactly_as_the_library_does(form: trainee.T5Form) -> None:
    parts = trainee.initial_parts(TINY, 1)
    for model in (parts.clip_l, parts.clip_g, parts.t5):
        assert model is not None
        randomized(model.double())
    parts.transformer.double()
    without = form in ("zeros", "omitted")
    rules = TextRules(t5_length=77 if form == "short" else 256, missing_t5="omit" if form == "omitted" else "zeros")
    conditioner = Conditioner(
        parts.clip_l, parts.clip_g, None if without else parts.t5, parts.tokenizers, rules, context_dim=256
    )
    expected = conditioner(CAPTIONS)
    with torch.no_grad():
        context, pooled = trainee.trainee_of(parts).condition(tokenize(CAPTIONS), form)
    torch.testing.assert_close(context, expected.context, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(pooled, expected.pooled, atol=1e-10, rtol=1e-10)


def test_every_trained_parameter_gets_a_gradient() -> None:
    model = trainee.trainee_of(trainee.initial_parts(TINY, 2))
    randomized(model)
    flow_loss(model, batches(dropped=0.0).draw(4), "short").backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Nobody reads what the last block's text tokens ask for.
    assert without == ["transformer.joint_blocks.1.context_block.attn.ln_q.weight"]


@pytest.mark.parametrize("form", ["short", "long", "omitted"])
def test_quick_gradients_are_those_of_the_plain_model(form: trainee.T5Form, tmp_path: Path) -> None:
    parts, batch = trainee.initial_parts(TINY, 2), batches(dropped=0.0).draw(4)
    model = trainee.trainee_of(parts)
    randomized(model)
    engines = [
        Engine(replace(run_of(FULL, tmp_path), quick=quick), deepcopy(parts))
        for quick in ((), ("lookup", "plain"), ("lookup", "bf16"))
    ]
    wanted = flow_loss(model, batch, form)
    wanted.backward()
    for engine, near in zip(engines, (1e-6, 1e-4, 0.05), strict=True):
        loss = engine.gradients(batch, form)
        assert loss.item() == pytest.approx(wanted.item(), rel=near)
        for (name, p), (_, quick) in zip(model.named_parameters(), engine.trainee.named_parameters(), strict=True):
            assert (p.grad is None) == (quick.grad is None), name
            if p.grad is not None and quick.grad is not None and p.grad.norm() > 1e-3:
                assert quick.grad.dtype == torch.float32
                assert (quick.grad - p.grad).norm() < 2 * near * p.grad.norm(), name


def test_narrow_weights_follow_their_masters(tmp_path: Path) -> None:
    engine = Engine(replace(run_of(FULL, tmp_path), quick=("bf16",)), trainee.initial_parts(TINY, 2))
    with torch.no_grad():
        engine.masters[0].fill_(1.01)
    assert not torch.equal(engine.weights[0].float(), engine.masters[0])
    engine.refresh()
    assert torch.equal(engine.weights[0], engine.masters[0].bfloat16())
    with pytest.raises(ValueError, match="unknown ways"):
        trainee.hurried(engine.trainee, ["slow"])


def test_recordings_of_all_forms_share_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives memory of a pool again only to the stream that had it."""
    given: list[tuple[object, object]] = []

    def recording(graph: object, *, pool: object, stream: object) -> nullcontext[None]:
        given.append((pool, stream))
        return nullcontext()

    fakes = {
        "graph": recording,
        "CUDAGraph": lambda: SimpleNamespace(pool=lambda: "the pool", replay=lambda: None),
        "Stream": lambda device: SimpleNamespace(device=device),
        "device": nullcontext,
        "max_memory_allocated": lambda device: 0,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(
        "mmdit.demo.train_mmdit._Captured",
        lambda *parts: SimpleNamespace(graph=parts[0], loss=parts[1], grads=parts[2]),
    )
    monkeypatch.setattr(Engine, "_run", lambda engine, *_: (torch.zeros(()), [None for _ in engine.masters]))
    engine, batch = Engine(run_of(FULL, tmp_path), trainee.initial_parts(TINY, 2)), batches(dropped=0.0).draw(4)
    engine.captures = True
    for form in ("short", "omitted"):
        engine.gradients(batch, form)
    (first_pool, first), (pool, stream) = given
    assert (first_pool, pool) == (None, "the pool")
    assert stream is first


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=SKIPS["two gpus"])
def test_a_step_is_recorded_on_a_gpu_that_is_not_the_current_one(tmp_path: Path) -> None:
    parts, batch, device = trainee.initial_parts(TINY, 2), batches(dropped=0.0).draw(4), torch.device("cuda:1")
    x0, noise, t = (one.to(device) for one in (batch.x0, batch.noise, batch.t))
    batch = Batch(x0, noise, t, batch.tokens.to(device))
    model = trainee.trainee_of(parts)
    randomized(model)
    model.to(device)
    run = replace(run_of(FULL, tmp_path), device=device)
    plain, recorded = Engine(run, deepcopy(parts)), Engine(replace(run, quick=("graphs",)), deepcopy(parts))
    for _ in range(2):  # recorded, then replayed
        losses = [engine.gradients(batch, "short") for engine in (plain, recorded)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
        for master, same in zip(plain.masters, recorded.masters, strict=True):
            assert (master.grad is None) == (same.grad is None)
            if master.grad is not None and same.grad is not None:
                assert (same.grad - master.grad).norm() <= 0.02 * master.grad.norm()
    assert recorded.captures, "it went on without a graph"
    assert torch.cuda.current_device() == 0


def test_compiled_code_is_kept_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, taken = random.Random(0).randbytes(trainee._PIECE + 1000), list[bytes]()
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (data, None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", taken.append)
    trainee.save_compiled(tmp_path / "compiled")
    assert sorted(file.name for file in (tmp_path / "compiled").iterdir()) == ["compiled.00", "compiled.01"]
    trainee.load_compiled(tmp_path / "compiled")
    assert taken == [data]
    assert trainee.load_compiled(tmp_path) == 0


def batches(dropped: float, seed: int = 0) -> Batches:
    latents = torch.randn(6, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    table = tokenize([f"{n} {colour} stars" for n in ("two", "three") for colour in ("red", "blue", "pink")] * 2)
    return Batches(latents, table, 2, dropped, 3.0, torch.Generator().manual_seed(seed))


def test_batches_pair_latents_with_captions_of_their_scene_and_drop_some() -> None:
    drawn = batches(dropped=0.25).draw(2000)
    empty = tokenize([""])
    dropped = (drawn.tokens.t5 == empty.t5).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.04)
    for table, nothing in ((drawn.tokens.clip_l, empty.clip_l), (drawn.tokens.clip_g, empty.clip_g)):
        assert torch.equal((table == nothing).all(1), dropped)
    source = batches(dropped=0.0)
    for x0, row in zip(drawn.x0[~dropped][:50], drawn.tokens.t5[~dropped][:50], strict=True):
        scene = (source.latents == x0).flatten(1).all(1).nonzero().item()
        assert (source.tokens.t5[2 * int(scene) : 2 * int(scene) + 2] == row).all(1).any()
    assert drawn.t.median().item() == pytest.approx(0.75, abs=0.03)  # shift 3 moves 0.5 there


def test_a_latent_with_a_mistake_is_noised_as_it_is_and_leads_to_the_right_one() -> None:
    """Captioned latents at late times are noised from the mistake; the path from there ends at the true latent."""
    source = batches(dropped=0.25)
    source.mistakes, source.mistaken = source.latents + 3.0, 0.5
    drawn, plain = source.draw(2000), batches(dropped=0.25).draw(2000)
    dropped = (drawn.tokens.t5 == tokenize([""]).t5).all(1)
    wrong = (drawn.noise != plain.noise).flatten(1).any(1)
    assert not (wrong & dropped).any()
    assert not (wrong & (drawn.t < source.mistaken_from)).any()
    may = ~dropped & (drawn.t >= source.mistaken_from)
    assert wrong[may].float().mean().item() == pytest.approx(0.5, abs=0.05)
    state = noised(drawn.x0, drawn.noise, drawn.t)[wrong]
    torch.testing.assert_close(state, noised(drawn.x0 + 3.0, plain.noise, drawn.t)[wrong])
    end = state - drawn.t[wrong][:, None, None, None] * (drawn.noise - drawn.x0)[wrong]
    torch.testing.assert_close(end, drawn.x0[wrong], atol=1e-5, rtol=0)


def test_forms_are_drawn_by_the_mix_of_their_phase(tmp_path: Path) -> None:
    run = run_of(replace(FULL, late_mix=T5Mix(0.0, 1.0, 0.0, 0.0)), tmp_path)
    rng = random.Random(0)
    early = Counter(draw_form(rng, run, 0.1) for _ in range(4000))
    assert early["short"] / 4000 == pytest.approx(0.70, abs=0.03)
    assert early["long"] / 4000 == pytest.approx(0.20, abs=0.03)
    assert early["zeros"] / 4000 == pytest.approx(0.05, abs=0.02)
    assert {draw_form(rng, run, 0.9) for _ in range(50)} == {"long"}


def test_the_loss_falls_on_a_fixed_batch() -> None:
    model = trainee.trainee_of(trainee.initial_parts(TINY, 0))
    optimizer, batch = make_optimizer(model), batches(dropped=0.0).draw(4)
    losses = []
    for step in range(20):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 3e-3 * min(1, (step + 1) / 5)
        loss = flow_loss(model, batch, "omitted")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    target = (batch.noise - batch.x0).square().mean().item()
    assert losses[0] == pytest.approx(target, rel=1e-5)  # the final layer starts at zero
    assert losses[-1] < 0.9 * losses[0]


def test_bfloat16_autocast_gives_the_same_loss_within_its_precision() -> None:
    model, batch = trainee.trainee_of(trainee.initial_parts(TINY, 0)), batches(dropped=0.0).draw(4)
    randomized(model)
    with torch.no_grad():
        wide = flow_loss(model, batch, "long")
        with torch.autocast("cpu", torch.bfloat16):
            narrow = flow_loss(model, batch, "long")
    assert narrow.item() == pytest.approx(wide.item(), rel=0.01)


def test_folding_the_scale_changes_no_picture_and_sets_the_std() -> None:
    vae = VAE(TINY.vae)
    pictures = torch.rand(4, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        before, raw = vae.encode(pictures), vae.encoder(pictures).chunk(2, 1)[0]
        decoded = vae.decode(before.mode())
        factor = fold_scale(vae, raw)
        after = vae.encode(pictures)
        torch.testing.assert_close(vae.decode(after.mode()), decoded, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(after.std, before.std * factor, rtol=1e-4, atol=0)
        assert after.mode().std().item() == pytest.approx(1.0, rel=1e-4)
        mean = (raw.mean().item() * factor - vae.config.shift) * vae.config.scale
        assert after.mode().mean().item() == pytest.approx(mean, abs=1e-4)


def test_vae_loss_is_what_its_formula_says() -> None:
    vae = VAE(TINY.vae)
    pictures, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 16, 4, 4)
    with torch.no_grad():
        total, level, kl = vae_loss(vae, pictures, noise, kl_weight=1e-3)
        mean, logvar = vae.encoder(pictures).chunk(2, 1)
        error = vae.decoder(mean) - pictures
        by_hand = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
        )
        edges = (error[:, :, 1:] - error[:, :, :-1]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
    assert kl.item() == pytest.approx(by_hand.sum().item() / 2, rel=1e-5)
    assert level.item() == pytest.approx(error.abs().mean().item(), rel=1e-5)
    assert total.item() == pytest.approx((level + 0.5 * edges + 1e-3 * kl).item(), rel=1e-5)


def test_pieces_join_to_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    content = random.Random(0).randbytes(PIECE + 1000)
    (tmp_path / "model" / "weights").write_bytes(content)
    (*pieces,) = write_pieces(tmp_path / "model", tmp_path / "pieces")
    assert [piece.name for piece in pieces] == ["SHA256SUMS", "embedded.tar.00", "embedded.tar.01"]
    assert all(piece.stat().st_size <= PIECE for piece in pieces)
    assert content in b"".join(piece.read_bytes() for piece in pieces[1:])


def test_a_dry_run_of_everything_leaves_a_model_that_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SETTINGS", evaluate.SETTINGS[:1] + evaluate.SETTINGS[3:4])
    small = replace(recipe.SMOKE, architecture=TINY, scenes=6, steps=2, vae_steps=1, held_out_scenes=2)
    pipe = train.train(run_of(small, tmp_path))
    assert isinstance(pipe, Pipeline)
    picture = pipe("a red circle", num_inference_steps=1, seed=0, output_type="pt").images
    assert picture.shape == (1, 3, 128, 128)
    assert "T5 missing: omitted" in (tmp_path / "evaluation.md").read_text()
    names = {file.name for file in tmp_path.iterdir()}
    assert {"embedded", "pieces", "log.txt", "progress.jsonl", "evaluation.json", "contact_sheet.png"} <= names
    again = train.train(run_of(small, tmp_path))  # the VAE is taken over, the transformer goes on
    assert torch.equal(again.vae.encoder.conv_out.weight, pipe.vae.encoder.conv_out.weight)


def test_processes_share_a_batch_and_hold_one_model(tmp_path: Path) -> None:
    """Mean gradients are those of the joined batch; after two steps with batches of their own, weights are equal."""
    joined, parts = batches(dropped=0.0).draw(4), trainee.initial_parts(TINY, 2)
    randomized(trainee.trainee_of(parts))
    alone = Engine(run_of(FULL, tmp_path), deepcopy(parts))
    alone.gradients(joined, "omitted")
    mix = T5Mix(0.0, 0.0, 0.0, 1.0)
    small = replace(recipe.SMOKE, architecture=TINY, batch=1, steps=2, mix=mix, late_mix=mix)

    def work(rank: int) -> tuple[list[Tensor | None], list[Tensor], float]:
        journal = Unwritten() if rank else Journal(tmp_path)
        run = replace(run_of(small, tmp_path), rank=rank, world=2, journal=journal)
        engine, mine, averaged = Engine(run, parts), slice(2 * rank, 2 * rank + 2), deepcopy(parts)
        engine.gradients(Batch(joined.x0[mine], joined.noise[mine], joined.t[mine], joined.tokens[mine]), "omitted")
        mean_gradients(engine.masters)
        grads = [p.grad for p in engine.masters]
        own = batches(0.0, seed=rank)
        train_mmdit(run, own, engine, averaged, 60.0, checked=lambda _: None, saved=lambda _: None)
        assert all(torch.isfinite(p).all() for p in engine.masters)
        weights = [p.detach() for p in trainee.trainee_of(averaged).parameters()]
        return grads, weights, float(torch.randn(1, generator=run.generator(3)))

    (grads, one, noise), (other_grads, other, other_noise) = values(in_processes(2, work))
    for master, grad, same in zip(alone.masters, grads, other_grads, strict=True):
        assert (master.grad is None) == (grad is None) == (same is None)
        if master.grad is not None and grad is not None and same is not None:
            assert torch.equal(grad, same)
            torch.testing.assert_close(grad, master.grad, atol=1e-6, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(next(parts.transformer.parameters()), one[0])
    assert noise != other_noise, "each process draws its own batches"
    assert (tmp_path / "mmdit.pt").exists()


def test_one_of_several_processes_trains_no_vae(tmp_path: Path) -> None:
    small = replace(recipe.SMOKE, architecture=TINY, scenes=4)
    with pytest.raises(ValueError, match="2 processes"):
        train.train(replace(run_of(small, tmp_path), world=2))


def test_processes_agree_on_the_clock_of_the_first(tmp_path: Path) -> None:
    run = replace(run_of(FULL, tmp_path), world=2)
    first, other = values(in_processes(2, lambda rank: (run.agreed(rank + 0.125), run.clock())))
    assert first == other
    assert first[0] == 0.125


def test_a_given_vae_is_taken_and_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SETTINGS", evaluate.SETTINGS[:1])
    small = replace(recipe.SMOKE, architecture=replace(TINY, vae=FULL.architecture.vae), scenes=4, steps=1)
    quick = replace(run_of(small, tmp_path), quick=("lookup", "bf16"))
    pipe = train.train(quick, vae=EMBEDDED)
    given = load_vae(EMBEDDED, dtype=torch.float32)
    assert torch.equal(pipe.vae.decoder.conv_out.weight.float(), given.decoder.conv_out.weight)
    assert "vae folded" not in (tmp_path / "log.txt").read_text()


def test_the_full_architecture_is_small_enough_to_commit() -> None:
    with torch.device("meta"):
        models = (
            MMDiT(FULL.architecture.transformer),
            VAE(FULL.architecture.vae),
            CLIPText(FULL.architecture.clip_l),
            CLIPText(FULL.architecture.clip_g),
            T5Encoder(FULL.architecture.t5),
        )
    count = sum(tensor.numel() for model in models for tensor in model.state_dict().values())
    twin = FULL.architecture.t5.vocabulary * FULL.architecture.t5.width  # T5's embedding is written twice
    assert 28_000_000 < 2 * (count + twin) < 29_500_000


def test_tokens_are_those_of_the_library() -> None:
    table = tokenize(CAPTIONS)
    assert isinstance(table, TokenTable)
    own = own_tokenizers()
    first = own.clip_g.encode(CAPTIONS[0]).ids
    assert table.clip_g[0].tolist() == [*first, *[own.clip_g.pad] * (LENGTH - len(first))]
