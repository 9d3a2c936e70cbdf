"""The log-sum-exp beside attention: the kernel's own where it is right, and the result is PyTorch's bit by bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdit.inspection import attention
from mmdit.inspection.attention import LogSumExp, by_rows


def drawn(dtype, queries=70, keys=70):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, queries, 64), (2, 3, keys, 64), (2, 3, keys, 64))
    return [(2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def dense(q, k):
    return torch.logsumexp(q.double() @ k.double().mT / 8, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_gives_its_own(dtype):
    q, k, v = drawn(dtype)
    both = LogSumExp()
    z, lse = both.attend(q, k, v)
    assert list(both.found.values()) == ["fused"]
    assert torch.equal(z, F.scaled_dot_product_attention(q, k, v))
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(lse.double(), dense(q, k), rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)


def test_of_some_keys():
    q, k, v = drawn(torch.float64, queries=33, keys=50)
    torch.testing.assert_close(LogSumExp().of(q, k[:, :, :7], v[:, :, :7]), dense(q, k[:, :, :7]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 3000, 10**9])
def test_blocks_of_rows_are_the_whole(limit):
    q, k, _ = drawn(torch.float64, queries=33)
    torch.testing.assert_close(by_rows(q, k, limit=limit), dense(q, k), rtol=0, atol=1e-12)


def test_a_block_of_rows_is_within_its_limit(monkeypatch):
    """Scores of all rows at once would be 2 x 3 x 70 x 70 numbers."""
    q, k, _ = drawn(torch.float32)
    sizes = []
    plain = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda x, dim: sizes.append(x.nbytes) or plain(x, dim=dim))
    by_rows(q, k, limit=20_000)
    assert len(sizes) == 7
    assert max(sizes) <= 20_000


def test_without_a_fused_kernel():
    q, k, v = drawn(torch.float32)
    both = LogSumExp()
    with sdpa_kernel(SDPBackend.MATH):
        z, lse = both.attend(q, k, v)
        assert torch.equal(z, F.scaled_dot_product_attention(q, k, v))
    assert list(both.found.values()) == ["rows"]
    torch.testing.assert_close(lse.double(), dense(q, k), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda z, lse: (z, lse / math.log(2)), "rows"),  # another base
        (lambda z, lse: (z, torch.full_like(lse, float("nan"))), "rows"),
        (lambda z, lse: (z * (1 + 1e-6), lse), "beside"),
        (lambda z, lse: (z, F.pad(lse, (0, 26))[..., None]), "fused"),  # cuDNN's and the efficient kernel's shapes
    ],
    ids=["base 2", "nan", "other bits", "padded"],
)
def test_kernels_are_tried(monkeypatch, change, how):
    q, k, v = drawn(torch.float32)
    plain = attention._flash
    monkeypatch.setitem(attention._KERNELS, 1, lambda *qkv: change(*plain(*qkv)))
    both = LogSumExp()
    for _ in range(2):
        z, lse = both.attend(q, k, v, slice(1, 2))
        assert torch.equal(z, F.scaled_dot_product_attention(q, k, v))
        torch.testing.assert_close(lse.double(), dense(q[1:], k[1:]), rtol=0, atol=1e-5)
    assert next(iter(both.found.values())) == how


def test_gradients_pass_through_the_result():
    q, k, v = (part.requires_grad_() for part in drawn(torch.float64))
    ways = (lambda *qkv: LogSumExp().attend(*qkv)[0], F.scaled_dot_product_attention)
    grads = [torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v)) for attend in ways]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_under_autocast_the_result_is_still_pytorchs():
    q, k, v = drawn(torch.float32)
    both = LogSumExp()
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = both.attend(q, k, v)
        assert torch.equal(z, F.scaled_dot_product_attention(q, k, v))
