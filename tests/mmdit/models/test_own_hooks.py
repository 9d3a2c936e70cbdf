"""Hooks that a user puts on any module of the model fire once a call, with the stream before and after it."""

import pytest
import torch

from inspected import inputs, model


@pytest.fixture(scope="module")
def small():
    return model()


def calls(small, given):
    """How often each module was called, and what went in and came out."""
    found = {}

    def keep(name):
        def hook(_, args, output):
            found.setdefault(name, []).append((args, output))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in small.named_modules()]
    try:
        small(*given)
    finally:
        for handle in handles:
            handle.remove()
    return found


def test_every_module_is_called(small):
    """Known wrong before: hooks on x_block, context_block and attn never fired."""
    found = calls(small, inputs())
    names = {name for name, module in small.named_modules() if type(module) is not torch.nn.ModuleList}
    assert set(found) == names
    assert {name for name, some in found.items() if len(some) != 1} == set()


def test_streams_and_attention_are_what_goes_in_and_comes_out(small):
    found = calls(small, inputs())
    for i in range(3):
        (block,) = found[f"joint_blocks.{i}"]
        for place, stream in enumerate(("context_block", "x_block")):
            ((args, output),) = found[f"joint_blocks.{i}.{stream}"]
            assert args[0] is block[0][place]
            assert output is block[1][place]
            ((_, update),) = found[f"joint_blocks.{i}.{stream}.attn"]
            assert (update is None) == (output is None) == (i == 2 and stream == "context_block")
            if update is not None:
                ((_, projected),) = found[f"joint_blocks.{i}.{stream}.attn.proj"]
                assert update is projected


def test_an_own_hook_may_change_a_stream(small):
    plain = small(*inputs())
    handle = small.joint_blocks[1].x_block.register_forward_hook(lambda _, __, x: 1.1 * x)
    changed = small(*inputs())
    handle.remove()
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(small(*inputs()), plain)
