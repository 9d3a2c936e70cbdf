"""What runs faster beside an accelerated transformer: the VAE and the text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encoders import VAE, CLIPText, T5Encoder
from encoders.conditioning import EncoderName
from mmdit.runtime.fast_vae import WHOLE, FastVAE
from mmdit.runtime.graphed_text import GraphedEncoder
from mmdit.runtime.versions import why_no_triton

_TITLES: dict[EncoderName, str] = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}


class Beside:
    """The fast VAE and the graphs of the text encoders, as far as they can run here.

    Args:
        vae: the VAE; None leaves it out.
        encoders: the text encoders by name; None is one that is missing.
        graph: whether to record CUDA graphs; None does so on a GPU.

    Raises:
        ValueError: a module of a model that would be run is compiled, hooked or replaced.
    """

    def __init__(
        self, vae: VAE | None, encoders: Mapping[EncoderName, CLIPText | T5Encoder | None], graph: bool | None
    ) -> None:
        self._graph = graph
        self._vae: FastVAE | None = None
        self._encoders: dict[EncoderName, GraphedEncoder] = {}
        self.report: dict[str, str] = {}
        self.left_out: list[str] = []
        why = "" if vae is None else why_no_triton(next(vae.parameters()))
        if why:
            self.left_out.append(f"the fast VAE, which needs Triton kernels: {why}")
        elif vae is not None:
            from mmdit.runtime import vae_kernels

            self._vae = FastVAE(vae, vae_kernels.norm)
            self.report["VAE"] = f"channels last, fused norms; tiles above {WHOLE} pixels"
        for name, model in encoders.items():
            if model is not None and graph is not False and next(model.parameters()).is_cuda:
                self._encoders[name] = GraphedEncoder(model, f"the {_TITLES[name]} encoder")
                self.report[_TITLES[name]] = "a CUDA graph"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle is built anew on the copies of the models, without graphs."""
        vae = None if self._vae is None else self._vae.vae
        return Beside, (vae, {name: one.model for name, one in self._encoders.items()}, self._graph)

    def vae(self, vae: VAE) -> FastVAE | VAE:
        """The fast VAE where it is that of this VAE and can run where that is now; else the VAE itself."""
        fast = self._vae
        return vae if fast is None or fast.vae is not vae or why_no_triton(next(vae.parameters())) else fast

    def encoders(self, models: Mapping[EncoderName, CLIPText | T5Encoder | None]) -> dict[EncoderName, GraphedEncoder]:
        """The graphs of those of these encoders that have one and are on a GPU now."""
        return {
            name: one
            for name, one in self._encoders.items()
            if one.model is models[name] and next(one.model.parameters()).is_cuda
        }

    def close(self) -> None:
        """Free the graphs; all models count as plain."""
        for encoder in self._encoders.values():
            encoder.close()
