"""Fixtures and options of the whole suite. Shapes in signatures are checked while it runs."""

import atexit
import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

gc.disable()  # until everything is collected: what imports and collection make, millions of objects, stays to the end
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only get in each other's way
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from jaxtyping import config as jaxtyping_config

from typecheck import check_signatures

check_signatures(["mmdit", "encoders", "quant", "samplers"])

import pytest
import torch

from full import FULL
from own_process import ALONE, alone
from skips import SKIPS

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined: the CPU interprets them, see triton_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--weights", metavar="FOLDER", type=Path, help="compare this checkpoint with diffusers")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """No garbage collection looks at what is there by then, neither those of the interpreter nor those of tests."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(700, 10, 40)  # a look at all objects finds hardly more than one at the young ones
        gc.enable()


atexit.register(gc.unfreeze)  # nanobind counts what is left when Python ends; pytest's last collections see none of it


# The longest first: one that is left to the end keeps a worker busy alone.
LONGEST = ("test_notebooks.py", "test_readmes.py", "test_embedded.py", "test_metrics.py", "test_many_generations.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Tests marked `alone` run in a process of their own, with the others of their file."""
    if pyfuncitem.get_closest_marker("alone") is None or os.environ.get(ALONE):
        return None
    if said := alone(pyfuncitem.path).get(pyfuncitem.name, "the test did not run in its own process"):
        pytest.fail(said, pytrace=False)
    return True


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed every generator; without a GPU `torch.manual_seed` would keep three formatted stacks for GPUs to come."""
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Signatures are checked only in tests; errors must come without that too."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def rounded_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU draws numbers of 16 bits as float32 ones, rounded, as the torch of these tests does.

    Torch 2.11 draws others from the same seed. What is made of them is right, but it is neither what was recorded with
    another torch nor what is drawn in float32.
    """
    rand, randn = torch.rand, torch.randn

    def rounded(draw: Any, *size: Any, dtype: torch.dtype | None = None, **how: Any) -> torch.Tensor:
        if dtype not in (torch.float16, torch.bfloat16):
            return draw(*size, dtype=dtype, **how)
        found = draw(*size, dtype=torch.float32, **how).to(dtype)
        return found.masked_fill_(found == 1, 0) if draw is rand else found  # which is below 1

    monkeypatch.setattr(torch, "rand", partial(rounded, rand))
    monkeypatch.setattr(torch, "randn", partial(rounded, randn))


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a pipeline have 64 pixels a side where no size is given: a quarter of the embedded model's."""
    from mmdit.pipeline.base import PipelineModels

    cells = PipelineModels._cells
    monkeypatch.setattr(
        PipelineModels, "_cells", lambda self, pixels, name: cells(self, 64 if pixels is None else pixels, name)
    )


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default profile reads 32 T5 tokens, not 256: three quarters of the tokens of a small picture are text."""
    from mmdit import PROFILES

    diffusers = PROFILES["diffusers"]
    text = replace(diffusers.text, t5_length=diffusers.text.t5_length if FULL else 32)
    monkeypatch.setitem(PROFILES, "diffusers", replace(diffusers, text=text))


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator["TinyFolders"]:
    """Diffusers folders of tiny random pipelines, by variant name, made when first asked for."""
    yield TinyFolders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def weights(request: pytest.FixtureRequest) -> Path:
    """The user's own checkpoint."""
    folder = request.config.getoption("--weights")
    if folder is None:
        pytest.skip(SKIPS["weights"])
    return folder


class TinyFolders:
    def __init__(self, root: Path) -> None:
        self.root = root

    def __getitem__(self, name: str) -> Path:
        import tiny

        folder = self.root / name
        return folder if folder.exists() else tiny.save(tiny.VARIANTS[name], folder)
