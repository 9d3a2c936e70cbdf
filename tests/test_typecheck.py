"""Signatures are checked while the suite runs, those with shapes and those without; one switch turns it off."""

from importlib import import_module
from inspect import unwrap
from pkgutil import iter_modules, walk_packages

import pytest
import torch
from jaxtyping import Float, config
from torch import Tensor

from full import FULL
from mmdit import MMDiTConfig, bench, demo
from mmdit.bench import localise
from mmdit.models.attention import Attend
from mmdit.utils import whole
from skips import SKIPS
from typecheck import AS_IMPORTED, SIGNATURES, _checked, checked, typed

Q = torch.zeros(1, 2, 3, 4)


def unreadable(functions):
    """The functions whose signatures cannot be read, and the errors."""
    found = {}
    for function in functions:
        try:
            _checked(function)
        except Exception as error:
            found[function.__qualname__] = type(error).__name__
    return found


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


@pytest.mark.skipif(not FULL, reason=SKIPS["full"])
def test_every_signature_can_be_read():
    """Of functions that no test calls too; the others' are read when they are first called."""
    for package in map(import_module, ("mmdit", "encoders", "quant", "samplers")):
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                import_module(module.name)
    assert unreadable(SIGNATURES) == {}


def test_a_signature_that_cannot_be_read_is_found(monkeypatch):
    def lost(x: "Lost") -> None:
        pass

    monkeypatch.setitem(AS_IMPORTED, __name__, {"Tensor": Tensor})
    assert unreadable([lost, whole]) == {lost.__qualname__: "NameError"}


def test_the_switch(monkeypatch):
    assert whole("name", 3, 1) == 3
    monkeypatch.setattr(config, "jaxtyping_disable", True)
    assert whole(3, 3, 1) == 3
