"""The user's own checkpoint against diffusers, one test per group of stages: pytest --weights=FOLDER."""

import os

import pytest
import torch

from mmdit import Comparison
from mmdit.parity.verify import GROUPS, group_of, verify

pytestmark = pytest.mark.filterwarnings("default")  # what a user's files warn of is shown, not a failure


@pytest.fixture(scope="session")
def found(weights) -> Comparison:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # the suite keeps to one; official weights need them all
    try:
        return verify(weights)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("group", GROUPS)
def test_equals_diffusers(found, group):
    stages = [stage for stage in found.stages if group_of(stage.name) == group]
    assert stages, f"nothing was compared of {group}"
    assert all(stage.ok for stage in stages), str(found)
