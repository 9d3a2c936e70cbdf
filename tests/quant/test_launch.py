"""Kernels are launched as Triton compiled them for their arguments, and Triton looks for them only once."""

import pytest
import torch

from quant.launch import Launcher


class Compiled:
    """A compiled kernel that notes its launches."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """A kernel that compiles in each launch, and notes the arguments."""

    def __init__(self, compiles=True):
        self.looked, self.launches, self.compiles = [], [], compiles

    def __getitem__(self, grid):
        def run(*args, num_warps):
            self.looked.append((grid, args, num_warps))
            return Compiled(self.launches) if self.compiles else None

        return run


class OnGpu1(torch.Tensor):
    def get_device(self):
        return 1


X, Y = torch.zeros(8), torch.zeros(8, dtype=torch.int32)
GRID, VALUES = (3, 1, 1), (4, 2.5)
OTHERS = {
    "dtype": (GRID, (X.half(), Y), VALUES, 2),
    "second dtype": (GRID, (X, Y.short()), VALUES, 2),
    "address": (GRID, (X[1:], Y), VALUES, 2),
    "second address": (GRID, (X, Y[1:]), VALUES, 2),
    "number": (GRID, (X, Y), (5, 2.5), 2),
    "constant": (GRID, (X, Y), (4, 3.5), 2),
    "warps": (GRID, (X, Y), VALUES, 4),
    "gpu": (GRID, (X.as_subclass(OnGpu1), Y), VALUES, 2),
}


def test_a_kernel_is_looked_for_once():
    kernel = Kernel()
    launch = Launcher(kernel)
    launch(GRID, (X, Y), VALUES, warps=2)
    launch((5, 2, 1), (X, Y), VALUES, warps=2)
    launch(GRID, (X[4:], Y.clone()), VALUES, warps=2)
    assert kernel.looked == [(GRID, (X, Y, *VALUES), 2)]
    (grid, first), (_, second) = kernel.launches
    assert grid == (5, 2, 1)
    assert first[0] is X
    assert first[2:] == VALUES
    assert second[0].data_ptr() == X[4:].data_ptr()


@pytest.mark.parametrize("other", OTHERS)
def test_another_kernel_is_looked_for_where_triton_compiles_another(other):
    kernel = Kernel()
    launch = Launcher(kernel)
    grid, tensors, values, warps = OTHERS[other]
    for _ in range(2):
        launch(GRID, (X, Y), VALUES, warps=2)
        launch(grid, tensors, values, warps=warps)
    assert len(kernel.looked) == len(kernel.launches) == 2
    assert kernel.looked[1][2] == warps
    assert all(one is two for one, two in zip(kernel.looked[1][1], kernel.launches[1][1], strict=True))


def test_the_interpreter_compiles_nothing():
    kernel = Kernel(compiles=False)
    launch = Launcher(kernel)
    for _ in range(2):
        launch(GRID, (X, Y), VALUES, warps=2)
    assert len(kernel.looked) == 2
