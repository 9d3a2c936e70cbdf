"""Signatures are checked while the suite runs, those with shapes and those without; one switch turns it off."""

from importlib import import_module
from inspect import unwrap
from pkgutil import iter_modules

import pytest
import torch
from jaxtyping import Float, config
from torch import Tensor

from mmdit import MMDiTConfig, bench, demo
from mmdit.bench import localise
from mmdit.models.attention import Attend
from mmdit.utils import whole
from typecheck import checked, typed

Q = torch.zeros(1, 2, 3, 4)


@checked
def same(x: Float[Tensor, "b l"], result: Tensor) -> Float[Tensor, "b l"]:
    return result


@checked
def outer(x: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    assert len(same(x.T, x.T)) == x.shape[1], "names of sizes are those of one call"
    return x


WRONG = {
    "a type": lambda: whole(3, 3, 1),
    "a field of a dataclass": lambda: MMDiTConfig(context_dim="wide"),
    "two shapes": lambda: Attend()(Q, Q, torch.zeros(1, 2, 5, 4)),
    "the shape of the result": lambda: same(Q[0, 0], Q[0, 0].T),
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


def test_sizes_belong_to_one_call():
    for x in (Q[0, 0], Q[0, 0].T):
        assert same(x, x) is x
        assert outer(x) is x


def test_names_in_signatures_are_those_of_the_import(monkeypatch):
    """A test that replaces a name of a module changes no check of the tests after it."""
    place = localise.Place
    assert unwrap(localise.shares_of).__annotations__["place"] == "Place"
    monkeypatch.setattr(localise, "Place", int)
    assert typed(unwrap(localise.shares_of)).__annotations__["place"] is place


def test_the_switch(monkeypatch):
    assert whole("name", 3, 1) == 3
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    assert whole(3, 3, 1) == 3
