"""The profiler unloads CUPTI where CUDA graphs survive that, and leaves the environment as it was."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from mmdit.runtime import profiler

NAME = "TEARDOWN_CUPTI"


@pytest.mark.parametrize(
    ("version", "before", "inside"),
    [("13.0", None, "1"), ("12.6", None, "1"), ("12.4", None, None), (None, None, None), ("13.0", "0", "0")],
)
def test_the_environment_of_a_profile(version, before, inside, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.delenv(NAME, raising=False)
    if before is not None:
        monkeypatch.setenv(NAME, before)
    with pytest.raises(KeyError), profiler._unloading():
        assert os.environ.get(NAME) == inside
        raise KeyError
    assert os.environ.get(NAME) == before


def test_kernels_by_time(monkeypatch):
    """Names, counts and milliseconds of what took time on the device, in an environment that unloads CUPTI."""
    events = [("copy", 3, 0), ("norm", 2, 500), ("product", 1, 2000)]
    made = [SimpleNamespace(key=name, count=count, self_device_time_total=us) for name, count, us in events]
    seen = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv(NAME, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: seen.append("wait"))
    profile = nullcontext(SimpleNamespace(key_averages=lambda: made))
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profile)
    found = profiler.kernels_of(lambda: seen.append(os.environ[NAME]), torch.device("cuda"))
    assert found == [("product", 1, 2.0), ("norm", 2, 0.5)]
    assert seen == ["1", "wait", "wait"]
