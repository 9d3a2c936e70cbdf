"""Signatures are checked while the suite runs, those with shapes and those without; one switch turns it off."""

import pytest
import torch
from jaxtyping import config

from mmdit import MMDiTConfig
from mmdit.models.attention import Attend
from mmdit.utils import whole

Q = torch.zeros(1, 2, 3, 4)
WRONG = {
    "a type": lambda: whole(3, 3, 1),
    "a field of a dataclass": lambda: MMDiTConfig(context_dim="wide"),
    "two shapes": lambda: Attend()(Q, Q, torch.zeros(1, 2, 5, 4)),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_call_that_breaks_its_signature_is_refused(call):
    with pytest.raises(TypeError, match=r"violates|Type-check"):
        call()


def test_the_switch(monkeypatch):
    assert whole("name", 3, 1) == 3
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    assert whole(3, 3, 1) == 3
