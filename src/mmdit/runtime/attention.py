"""Exact attention by the fastest installed kernel for each shape, chosen by measuring once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmdit.runtime.rows import Attention
from quant.timing import milliseconds

_SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
_LIBRARIES = {"flash-attn-4": "flash_attn.cute", "flash-attn-3": "flash_attn_interface"}
# A kernel is taken for the one before it where it is quicker by more than this share and these milliseconds. Less is
# noise, by which drawings would differ from run to run.
_SHARE, _LEAST = 0.03, 0.005


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own choice; [b, tokens, heads, head_dim] in and out, the result contiguous."""
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


class Choice(NamedTuple):
    """What was chosen for a shape, and how long the others took; printed as one line."""

    name: str
    kernel: Attention
    milliseconds: dict[str, float]  # of one attention, by kernel
    refused: dict[str, str]  # error message of each kernel that failed

    def __str__(self) -> str:
        times = ", ".join(f"{name} {time:.3f} ms" for name, time in sorted(self.milliseconds.items()))
        refused = "".join(f"; {name} refused: {why}" for name, why in self.refused.items())
        absent = [name for name in _LIBRARIES if name not in {**self.milliseconds, **self.refused}]
        missing = f"; not installed: {', '.join(absent)}" if absent else ""
        return f"{self.name} ({times}{refused}{missing})"


class BestAttention:
    """Attention by the kernel that is quickest for the shapes at hand.

    The first call with a shape measures all kernels that are there; on other devices than GPUs torch chooses.

    Args:
        only: the name of the one kernel to use; None measures.

    Raises:
        ValueError: there is no kernel of that name here.
    """

    def __init__(self, only: str | None = None) -> None:
        self.kernels = _installed()
        if only is not None:
            if only not in self.kernels:
                raise ValueError(f"attention={only!r} is not here; there are {', '.join(self.kernels)}")
            self.kernels = {only: self.kernels[only]}
        self.choices: dict[tuple[object, ...], Choice] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention; [b, tokens, heads, head_dim] in and out."""
        if not q.is_cuda:
            return torch_attention(q, k, v)
        key = (q.shape, q.dtype, q.device)
        if key not in self.choices:
            self.choices[key] = _measured(self.kernels, q, k, v)
        return self.choices[key].kernel(q, k, v)


def _per_call(run: Callable[[], object]) -> float:
    """Milliseconds of a call, of as many in a row as take about a millisecond."""
    count = min(max(int(1 / max(milliseconds(run, 3), 1e-3)), 1), 50)

    def several() -> None:
        for _ in range(count):
            run()

    return milliseconds(several, 7) / count


def _installed() -> dict[str, Attention]:
    """By name: torch's kernels, and those of libraries that are installed."""
    found: dict[str, Attention] = {name: partial(_by_torch, backend) for name, backend in _SDPA.items()}
    for name, module in _LIBRARIES.items():
        if find_spec(module.split(".", maxsplit=1)[0]) is not None and find_spec(module) is not None:
            found[name] = partial(_by_library, module)
    return found


def _by_torch(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return torch_attention(q, k, v)


def _by_library(module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = import_module(module).flash_attn_func(q, k, v)
    return found[0] if isinstance(found, tuple) else found


def _measured(kernels: dict[str, Attention], q: Tensor, k: Tensor, v: Tensor) -> Choice:
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, kernel in kernels.items():
        try:
            with warnings.catch_warnings():  # warnings of the libraries' compilers, which do not concern our users
                warnings.simplefilter("ignore")
                times[name] = _per_call(partial(kernel, q, k, v))
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError, ImportError) as error:
            refused[name] = (str(error).splitlines() or [type(error).__name__])[0]
    if not times:
        raise RuntimeError(f"no attention kernel takes {list(q.shape)}, {q.dtype}: {refused}")
    best = chosen(times)
    return Choice(best, kernels[best], times, refused)


def chosen(times: dict[str, float]) -> str:
    """The first kernel that is as quick as the quickest one, up to noise."""
    limit = min(times.values()) * (1 + _SHARE) + _LEAST
    return next(name for name, time in times.items() if time <= limit)
