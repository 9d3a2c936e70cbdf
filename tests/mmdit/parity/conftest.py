"""The pipelines that tests of comparisons share: ours, and diffusers' on the same files."""

import pytest

import tiny
from mmdit import Pipeline


@pytest.fixture(scope="module")
def right(tiny_folders):
    return Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])


@pytest.fixture(scope="module")
def reference(tiny_folders):
    return tiny.load(tiny_folders["sd3.5-medium"])
