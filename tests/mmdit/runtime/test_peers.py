"""Exchanges by stores into other ranks' memory: the kernels, interpreted, and a fast forward over forked processes."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mmdit.models.mmdit import MMDiT, MMDiTConfig
from mmdit.pipeline.parallelize import PipelineParallel
from mmdit.runtime import peer_setup, peers, plain_kernels
from mmdit.runtime.accelerate import Accelerated
from mmdit.runtime.fast import FastMMDiT
from mmdit.runtime.graphs import Graphs
from mmdit.runtime.mesh import Team, shares, starts
from mmdit.runtime.peer_setup import connected
from mmdit.runtime.peers import Arena, Peers, unfit
from mmdit.runtime.rows import Rows
from mmdit.runtime.sequence import SequenceParallel, _Kernels
from processes import in_processes, values
from skips import SKIPS
from triton_device import HAS_TRITON, quiet

if HAS_TRITON:
    from mmdit.runtime import kernels, peer_kernels

pytestmark = pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason=SKIPS["triton"])
CPU, PAGE = torch.device("cpu"), 2**12
HEADS, WIDTH = 5, 16


class Near(Peers):
    """Ranks whose memories are pieces of one tensor; they meet by gloo, or run one after the other."""

    def meet(self):
        if dist.is_initialized():
            dist.barrier()


def near(team, memory):
    """The exchanges of a rank, in its row of `memory`, uint8 [ranks, bytes]."""
    used = 0

    def allocate(nbytes):
        nonlocal used
        used, start = used + nbytes + -nbytes % PAGE, used
        assert used <= memory.shape[1], "the test gives enough memory"
        distances = tuple((rank - team.rank) * memory.shape[1] for rank in range(team.size))
        return Arena(memory[team.rank, start:used], distances)

    return Near(team, CPU, allocate)


def a_team(rank, size):
    """A team without a process group."""
    team = Team.__new__(Team)
    team.rank, team.size, team.sent = rank, size, 0
    return team


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(peers, "_ROUND", PAGE)


@pytest.mark.parametrize("text", [[1, 2, 2], [0, 0, 0]], ids=["joint", "image"])
def test_each_rank_gets_its_heads_and_its_tokens_back_in_the_order_of_one_rank(text, small_pages):
    """Three ranks with 2 + 2 + 1 heads, uneven tokens and two samples; to the last bit."""
    image, samples, draw = [3, 2, 2], 2, torch.Generator().manual_seed(0)
    memory = torch.zeros(3, 2**17, dtype=torch.uint8)
    ranks = [near(a_team(rank, 3), memory) for rank in range(3)]
    qkv = torch.randn(samples, sum(text) + sum(image), 3 * HEADS * WIDTH, generator=draw)
    norms = torch.randn(2, 2, WIDTH, generator=draw)
    by_rank = shares(HEADS, 3)

    def part(tensor, rank):
        """A rank's text and image tokens."""
        first, second = starts(text)[rank], sum(text) + starts(image)[rank]
        return tensor[:, first : first + text[rank]], tensor[:, second : second + image[rank]]

    def packed(parts):
        rows = Rows(samples, parts[0].shape[1], parts[1].shape[1])
        return torch.cat([one.flatten(0, 1) for one in parts]), norms, rows, WIDTH

    def attended(q, k, v):
        return q + 2 * k - v

    with quiet():
        wanted = kernels.pack(*packed(qkv.split([sum(text), sum(image)], dim=1)))
        for rank, one in enumerate(ranks):
            one.send(*packed(part(qkv, rank)), text, image)
        sizes = (samples, HEADS, WIDTH, torch.float32, text, image)
        for rank, one in enumerate(ranks):
            joint = one.places(*sizes).joint
            mine = slice(starts(by_rank)[rank], starts(by_rank)[rank] + by_rank[rank])
            assert all(torch.equal(found, whole[:, :, mine]) for found, whole in zip(joint, wanted, strict=True))
            one.send_back(attended(*joint), HEADS, text, image)
    for rank, one in enumerate(ranks):
        assert torch.equal(one.places(*sizes).back, torch.cat(part(attended(*wanted), rank), dim=1))
        own, unit = text[rank] + image[rank], samples * WIDTH * 4
        forth, back = 3 * own * (HEADS - by_rank[rank]), (qkv.shape[1] - own) * by_rank[rank]
        assert one.team.sent == (forth + back) * unit
        for _ in range(2):
            one.close()
            assert one.nbytes == 0


def keys_of_a_drawing(cells, samples=2):
    """Joint attention, attention of the image alone (the second one of a block, or a ControlNet), and the hint's."""
    text, image = shares(154, 2)[::-1], shares(cells * cells, 2)
    return [(samples, 24, 64, torch.bfloat16, some, image) for some in (text, [0, 0])]


@pytest.mark.parametrize("sides", [(64,), (64, 32), (32, 48, 64)], ids=["one size", "falling", "growing"])
def test_results_are_never_where_heads_of_another_attention_go(sides):
    """A rank may send the heads of the next attention while another one still reads the results of the last."""
    memory = torch.empty(2, 2**28, dtype=torch.uint8)  # never written
    one = near(a_team(0, 2), memory)
    keys = [key for side in sides for samples in (1, 2) for key in keys_of_a_drawing(side, samples)]
    for key in keys:
        one.places(*key)
    regions = [one.places(*key) for key in keys]

    def span(tensor):
        return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)

    for heads in (span(places.joint) for places in regions):
        for results in (span(places.back) for places in regions):
            assert heads.stop <= results.start or results.stop <= heads.start
    largest = near(a_team(0, 2), torch.empty_like(memory))
    largest.places(*keys_of_a_drawing(64)[0])
    assert one.nbytes == largest.nbytes  # what was too small is gone


def test_graphs_are_cleared_where_their_memory_is_replaced():
    one, graphs = near(a_team(0, 2), torch.empty(2, 2**28, dtype=torch.uint8)), Graphs()
    one.graphs.add(graphs)
    for side, kept in ((32, True), (16, True), (64, False)):
        graphs._captured["step"] = None
        one.places(*keys_of_a_drawing(side)[0])
        assert ("step" in graphs) is kept, side


@pytest.mark.parametrize(
    ("head_dim", "dtype", "fits"), [(64, torch.bfloat16, True), (48, torch.bfloat16, False), (64, torch.float64, False)]
)
def test_models_whose_heads_cannot_be_stored(head_dim, dtype, fits):
    """They are named before a run, and where one joins later."""
    assert (unfit(head_dim, dtype) == "") is fits
    one = near(a_team(0, 2), torch.zeros(2, PAGE, dtype=torch.uint8))
    assert one.takes(torch.zeros(1, dtype=dtype), head_dim) is fits
    assert list(one.refused) == ([] if fits else [unfit(head_dim, dtype)])


def test_a_reason_of_one_rank_is_that_of_all(monkeypatch):
    """Ranks that see no reason themselves do not wait for names of hosts that the others never send."""

    def work(rank):
        if rank:
            monkeypatch.setattr(peer_setup, "find_spec", lambda name: None)
        return connected(Team(dist.group.WORLD), torch.device("cuda", 0))

    assert values(in_processes(2, work, limit=20)) == [(None, "NCCL: triton is not installed (rank 1)")] * 2


def test_shared_memory_is_freed_after_the_graphs_also_where_the_model_was_changed():
    torch.manual_seed(0)
    sizes = {"depth": 1, "hidden_size": 32, "context_dim": 8, "pooled_dim": 8, "pos_embed_size": 4}
    model = MMDiT(MMDiTConfig(**sizes, head_dim=WIDTH, sample_size=4)).eval().requires_grad_(False)
    one = near(a_team(0, 2), torch.zeros(2, PAGE, dtype=torch.uint8))
    accelerated = Accelerated(model, sequence=SequenceParallel(one.team, one))
    accelerated._weights = SimpleNamespace(moved=0, still=True)  # of a budget: the fast forward is built anew in a step
    assert list(one.graphs) == [accelerated.graphs]
    accelerated.graphs._captured["step"] = None
    model.joint_blocks[0].register_forward_hook(lambda *_: None)
    parallel = PipelineParallel.__new__(PipelineParallel)
    parallel.pipe = SimpleNamespace(transformer=model, accelerated=accelerated, parallel=parallel)
    parallel.decoder = parallel.lifeline = SimpleNamespace(close=lambda: None)
    parallel.sequence = accelerated.sequence
    with pytest.raises(ValueError, match="hook"):
        parallel.close()
    assert (one.nbytes, len(accelerated.graphs), parallel.pipe.parallel) == (0, 0, None)


def test_meeting_tells_all_others_and_counts():
    memory = torch.full((3, 3), 7, dtype=torch.int32)
    counter = torch.tensor([4], dtype=torch.int32)
    peer_kernels.meet(memory[1], torch.tensor([-3, 0, 3]), counter, 1)
    assert memory.tolist() == [[7, 5, 7], [7, 7, 7], [7, 5, 7]]
    assert counter.item() == 5


def test_the_check_of_the_exchange(small_pages):
    """Two processes exchange known numbers; memory that arrives elsewhere is seen."""
    memory = torch.zeros(2, 2**17, dtype=torch.uint8).share_memory_()

    def work(rank):
        said = []
        for wrong in (True, False):
            one = near(Team(dist.group.WORLD), memory)
            if rank and wrong:
                one.places(1, 3, 16, torch.float32, [1, 1], [1, 1]).tokens[0, 2] += 1
            try:
                one.check()
            except RuntimeError as error:
                said.append(str(error))
            one.meet()
        return said

    with quiet():
        first, second = values(in_processes(2, work))
    assert ["came back wrong" in one for one in first] == [True]
    assert second == []


def test_a_fast_forward(small_pages):
    """Two processes compute what one does, without the collective; the other kernels are plain torch."""
    torch.manual_seed(0)
    sizes = {"depth": 2, "hidden_size": HEADS * WIDTH, "context_dim": 24, "pooled_dim": 16, "pos_embed_size": 8}
    model = MMDiT(MMDiTConfig(**sizes, head_dim=WIDTH, sample_size=8, dual_attention_blocks=(0,)))
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor, std=0.1 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5)
    model.eval().requires_grad_(False)
    latent, context, pooled = torch.randn(1, 16, 4, 6), torch.randn(1, 5, 24), torch.randn(1, 16)
    memory = torch.zeros(2, 2**19, dtype=torch.uint8).share_memory_()

    def attention(q, k, v):
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()

    def forward(sequence=None):
        fast = FastMMDiT(
            model, kernels=_Kernels(plain_kernels, plain_kernels.pack), attention=attention, sequence=sequence
        )
        table = fast.table(torch.tensor([500.0]), pooled)
        return fast(latent, fast.tokens(context), table[0])

    def work(rank):
        team = Team(dist.group.WORLD)
        team.exchanged = None  # the collective is not used
        return forward(SequenceParallel(team, near(team, memory)))

    with quiet():
        wanted = forward()
        for found in values(in_processes(2, work)):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_without_gpus_collectives_are_taken():
    def work(rank):
        team, said = Team(dist.group.WORLD), []
        for exchange in ("auto", "nccl"):
            found, how = connected(team, CPU, exchange)
            assert found is None
            said.append(how)
        with pytest.raises(RuntimeError, match="need GPUs"):
            connected(team, CPU, "peers")
        return said

    for auto, asked in values(in_processes(2, work)):
        assert auto.startswith("gloo: ")
        assert "cpu" in auto
        assert asked.startswith("gloo")
