"""Barriers in torch's compiled kernels that read what they have written.

A reduction that torch.compile writes in several loops may store a tensor in one loop and load it in a later one. Triton
may give both another layout, by what else each loop reads, so that threads load what others have yet to store: torch
2.11 on an H200 then gave gradients thousands of times their size, with a loss that was right, and others in each run.
Known as pytorch/pytorch#190517 and triton-lang/triton#10924. A barrier of the thread block between the loops mends it.
"""

from __future__ import annotations

from typing import Any, Final

import torch

# torch looks compiled code up by its settings, among others: one that changes nothing here, because it is for kernels
# that users write, keeps code without barriers, which other programs have left on the disk, away.
SETTINGS: Final[dict[str, str | int | bool]] = {"triton.unique_user_kernel_names": True}


def with_barriers(backend: str = "inductor") -> dict[str, Any]:
    """The arguments of torch.compile that name the backend; kernels of "inductor" then have the barriers.

    Raises:
        RuntimeError: see `add_barriers`.
    """
    if backend != "inductor":
        return {"backend": backend}
    add_barriers()
    return {"backend": backend, "options": SETTINGS}


def add_barriers() -> None:
    """Give the barriers to all kernels that torch compiles for GPUs in this process from now on.

    A second call changes nothing.

    Raises:
        RuntimeError: this version of torch generates its code in another way.
    """
    # The compiler takes seconds to load.
    from torch._inductor.codegen.common import CSE  # noqa: PLC0415
    from torch._inductor.codegen.triton import TritonKernel  # noqa: PLC0415

    plain: Any = TritonKernel.load
    if getattr(plain, "has_barriers", False):
        return
    if not hasattr(CSE(), "invalidated_stores"):
        raise RuntimeError(
            f"torch {torch.__version__} compiles kernels in another way than 2.11 to 2.13: the barriers without which "
            "gradients were wrong there cannot be added. Train without compile, or with one of these versions"
        )

    def load(self: Any, name: str, index: Any) -> Any:
        if name in self.cse.invalidated_stores:  # stored in a loop that has ended, whose code is in the body
            self.body.writeline("tl.debug_barrier()")
        return plain(self, name, index)

    load.has_barriers = True  # type: ignore[attr-defined]
    TritonKernel.load = load  # type: ignore[method-assign]
