"""Exchanges by stores into other ranks' memory: the kernels, interpreted, and a fast forward over forked processes."""

import pytest
import torch
import torch.distributed as dist

from mmdit.models.mmdit import MMDiT, MMDiTConfig
from mmdit.runtime import peers, plain_kernels
from mmdit.runtime.fast import FastMMDiT
from mmdit.runtime.mesh import Team, shares, starts
from mmdit.runtime.peers import Arena, Peers, connected
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
