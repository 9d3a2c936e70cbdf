"""Models under torch.compile."""

from __future__ import annotations

from torch import nn


def refuse_compiled(model: nn.Module, name: str) -> None:
    """Raise ValueError for a model of which any part is compiled."""
    for part, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"{part or name} is compiled (torch.compile), and a hook that is added after compiling never fires: "
                "nothing would be seen or changed. Look into the model before it is compiled, or load it again"
            )
