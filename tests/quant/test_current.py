"""Functions that launch Triton kernels run on the GPU of their tensors, however these are given."""

from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from quant.current import on_its_device


class OnGpu1(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    is_cuda = True

    def get_device(self):
        return 1


class Product(NamedTuple):
    codes: torch.Tensor
    scale: torch.Tensor | None


HERE = torch.ones(2)
THERE = torch.ones(2).as_subclass(OnGpu1)
CALLS = {
    "positional": ((THERE,), {}, 1),
    "keyword": ((), {"x": THERE}, 1),
    "keyword after a number": ((1.0, None), {"kind": "static", "x": THERE}, 1),
    "tuple": ((Product(THERE, None),), {}, 1),
    "tuple by keyword": ((), {"first": None, "second": (THERE, None)}, 1),
    "list": (([THERE],), {}, 1),
    "after one on the CPU": ((HERE, THERE), {}, 1),
    "after one on the CPU, by keyword": ((HERE,), {"up": THERE}, 1),
    "on the CPU": ((HERE,), {"up": HERE}, 0),
    "no tensor": ((), {"rows": 3}, 0),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_gpu_of_the_tensors_is_the_current_one(call, monkeypatch):
    current = [0]

    @contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    args, kwargs, wanted = CALLS[call]
    assert on_its_device(lambda *_, **__: torch.cuda.current_device())(*args, **kwargs) == wanted
    assert current == [0]
