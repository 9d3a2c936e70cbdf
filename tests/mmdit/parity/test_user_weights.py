"""The user's own checkpoint against diffusers, one test per group of stages: pytest --weights=FOLDER."""

import os

import pytest
import torch

from mmdit.parity.verify import GROUPS, Report, verify

pytestmark = pytest.mark.filterwarnings("default")  # what a user's files warn of is shown, not a failure


@pytest.fixture(scope="session")
def report(weights) -> Report:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # the suite keeps to one; official weights need them all
    try:
        return verify(weights)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("group", GROUPS)
def test_equals_diffusers(report, group):
    stages = [stage for stage in report.stages if stage.group == group]
    assert stages, f"nothing was compared of {group}"
    assert all(stage.passed for stage in stages), report.text()
