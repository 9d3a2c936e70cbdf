"""Signatures are checked while the suite runs, those with shapes and those without; one switch turns it off."""

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from jaxtyping import config

from mmdit import MMDiTConfig, bench, demo
from mmdit.models.attention import Attend
from mmdit.utils import whole

Q = torch.zeros(1, 2, 3, 4)
WRONG = {
    "a type": lambda: whole(3, 3, 1),
    "a field of a dataclass": lambda: MMDiTConfig(context_dim="wide"),
    "two shapes": lambda: Attend()(Q, Q, torch.zeros(1, 2, 5, 4)),
}


@pytest.mark.parametrize("room", [demo, bench])
def test_every_program_can_be_imported(room):
    """Constants of modules that no other test imports are made under the check too."""
    for module in iter_modules(room.__path__, f"{room.__name__}."):
        import_module(module.name)


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_call_that_breaks_its_signature_is_refused(call):
    with pytest.raises(TypeError, match=r"violates|Type-check"):
        call()


def test_the_switch(monkeypatch):
    assert whole("name", 3, 1) == 3
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    assert whole(3, 3, 1) == 3
