"""Labelled tensors: selecting, averaging, and refusing labels that are not there."""

import numpy as np
import pytest
import torch

from mmdit import Labelled

VALUES = torch.arange(12.0).reshape(3, 2, 2)
FOUND = Labelled(
    VALUES, {"step": (0, 0, 1), "branch": ("uncond", "cond"), "head": (3, 5)}, {"call": ("step", (0, 1, 0))}
)


def test_selecting():
    assert FOUND.dims == ("step", "branch", "head")
    one = FOUND.sel(step=1, branch="cond")
    assert (one.dims, one.values.tolist()) == (("head",), [10.0, 11.0])
    assert one.notes == {}
    both = FOUND.sel(step=0)  # two calls of one step keep their dimension
    assert both.dims == ("step", "branch", "head")
    assert both.labels("call") == (0, 1)
    assert both.sel(call=1).values.tolist() == [[4.0, 5.0], [6.0, 7.0]]
    assert FOUND.sel(head=[5, 3]).values[0].tolist() == [[1.0, 0.0], [3.0, 2.0]]


def test_averaging_and_numpy():
    mean = FOUND.mean("branch")
    assert torch.equal(mean.values, VALUES.mean(1))
    assert mean.dims == ("step", "head")
    assert FOUND.mean("step").notes == {}
    assert np.asarray(FOUND).shape == (3, 2, 2)
    assert np.asarray(Labelled(VALUES.bfloat16(), FOUND.axes)).dtype == np.float32
    lines = repr(FOUND).splitlines()
    assert "float32 [3, 2, 2]" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == [*FOUND.axes, *FOUND.notes]
    assert lines[2].split()[-2:] == ["uncond,", "cond"]


def test_what_is_not_there():
    with pytest.raises(ValueError, match=r"'brach'.*'branch'"):
        FOUND.sel(brach="cond")
    with pytest.raises(ValueError, match="branch has no 'skip', but 'uncond', 'cond'"):
        FOUND.sel(branch="skip")
    with pytest.raises(ValueError, match=r"values have shape \[3, 2, 2\]"):
        Labelled(VALUES, {"step": (0, 1)})
