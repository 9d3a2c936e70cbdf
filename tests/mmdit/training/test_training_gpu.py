"""Steps on a GPU: float8 bases, compiled blocks and modulation ahead give the numbers of plain steps."""

import gc
import importlib.util

import pytest
import torch

from mmdit.models.config import MMDiTConfig
from mmdit.models.mmdit import MMDiT
from mmdit.training.adapters import attach
from mmdit.training.batches import InMemory, Sample
from mmdit.training.blocks import compile_blocks, recompute
from mmdit.training.config import TrainingConfig
from mmdit.training.loop import Training, training_step
from mmdit.training.modulation import ModulationAhead
from mmdit.training.setup import ahead_of, make_optimizer, place
from skips import SKIPS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=SKIPS["gpu"])]
NO_TORCHAO = importlib.util.find_spec("torchao") is None
CONFIG = MMDiTConfig(depth=3, hidden_size=256, context_dim=128, pooled_dim=64, pos_embed_size=16)


def losses(quant: str | None, *, compiled: bool = False, ahead: int = 0, again: bool = True) -> tuple[list[float], int]:
    gc.collect()  # of the run before, whose memory would count
    before = torch.cuda.memory_allocated()
    generator = torch.Generator().manual_seed(0)
    model = MMDiT(CONFIG).requires_grad_(False).bfloat16()
    for one in model.parameters():
        scale = 0.3 if one.ndim < 2 else 0.7 * one[0].numel() ** -0.5
        one.data = (scale * torch.randn(one.shape, generator=generator)).bfloat16()
    place(model, torch.device("cuda"), quant)
    config = TrainingConfig(batch_size=2, rank=4, learning_rate=1e-2, steps=4, shift=3.0, ahead=ahead)
    adapters = attach(model, config)
    parameters = {f"{name}.{key}": one for name, part in adapters.items() for key, one in part.named_parameters()}
    if again:
        recompute(model.joint_blocks, keep_attention=True)
    if compiled:
        compile_blocks(model.joint_blocks)
    made = [
        Sample(
            torch.randn(16, 16, 16, generator=generator),
            None,
            torch.randn(20, 128, generator=generator),
            torch.randn(64, generator=generator),
        )
        for _ in range(4)
    ]
    samples = InMemory(made, (torch.zeros(20, 128), torch.zeros(64)))
    run = Training(
        config,
        model,
        parameters,
        samples,
        make_optimizer(parameters.values(), config),
        3.0,
        torch.device("cuda"),
        torch.bfloat16,
    )
    if ahead:
        ahead_of(run, model)
    torch.cuda.reset_peak_memory_stats()
    found = [float(training_step(run, step).loss) for step in range(4)]
    return found, torch.cuda.max_memory_allocated() - before


# Warnings of torch's compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("as_users_run_it")  # a compiler refuses what checks of signatures note in a checkpointed block
@pytest.mark.parametrize("quant", [None, "fp8"])
def test_all_ways_of_a_step_give_the_same_losses(quant) -> None:
    plain, whole = losses(quant, again=False)
    again, kept = losses(quant)
    assert again == pytest.approx(plain, rel=2e-2)
    assert kept < whole
    for settings in ({"ahead": 3}, {"compiled": True, "ahead": 3 if quant else 0}):  # compiling takes most of the time
        found, _ = losses(quant, **settings)
        assert found == pytest.approx(plain, rel=3e-2), settings
    assert plain[-1] != plain[0]


def test_modulation_visits_the_gpu_for_other_passes() -> None:
    with torch.device("cuda"):
        model = MMDiT(CONFIG).requires_grad_(False)
    for one in model.parameters():
        one.normal_(std=0.1)
    latent, context, pooled = (torch.randn(size, device="cuda") for size in ((2, 16, 8, 8), (2, 5, 128), (2, 64)))
    inputs = latent, torch.tensor([300.0, 20.0], device="cuda"), context, pooled
    wanted = model(*inputs)
    ahead = ModulationAhead(model, 2, 3, lambda number: (torch.full((2,), 0.1 * number), pooled.cpu()), 4)
    ahead.enter(1)
    of_the_pass = model(*inputs)
    for _ in range(2):
        with ahead.restored():
            assert torch.equal(model(*inputs), wanted)
        assert torch.equal(model(*inputs), of_the_pass)
        assert all(one.is_pinned() for place in ahead.places for one in place.made.parameters())


@pytest.mark.skipif(NO_TORCHAO, reason=SKIPS["torchao"])
@pytest.mark.filterwarnings("ignore")  # torchao's own, of its optional parts
def test_adamw_with_states_of_8_bits_steps_like_adamw_and_holds_a_quarter_of_its_states():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(512, 512, generator=generator)
    grads = [torch.randn(512, 512, generator=generator).cuda() for _ in range(10)]
    ends, sizes = [], []
    for kind in ("adamw", "adamw8bit"):
        weight = torch.nn.Parameter(first.cuda())
        optimizer = make_optimizer([weight], TrainingConfig(optimizer=kind, learning_rate=1e-2))
        for grad in grads:
            weight.grad = grad.clone()
            optimizer.step()
        ends.append(weight.detach() - first.cuda())
        parts = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        sizes.append(sum(part.nbytes if type(part) is torch.Tensor else part.codes.nbytes for part in parts))
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()
    assert not torch.equal(*ends)
    assert sizes[1] * 4 == sizes[0]
