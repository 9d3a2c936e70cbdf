"""A checkpoint with random weights in the official layout: `python -m mmdit.demo.seeded FOLDER`.

It shows that a fresh machine can load and draw while the embedded model is not trained yet. Its pictures mean nothing:
transformer and text encoders are random; only the VAE is trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mmdit.checkpoint import load_vae
from mmdit.demo.recipe import FULL
from mmdit.demo.trainee import initial_parts
from mmdit.pipeline import Pipeline

__all__ = ["VAE_WEIGHTS", "main", "write_seeded"]

VAE_WEIGHTS = Path(__file__).parent / "weights" / "vae.safetensors"


def write_seeded(folder: str | Path, seed: int = 0) -> Path:
    """Write the checkpoint; the same bytes for the same seed.

    Raises:
        FileExistsError: there is something at `folder`.
    """
    parts = initial_parts(FULL.architecture, seed)
    parts.vae = load_vae(VAE_WEIGHTS, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.transformer.parameters():
            if not parameter.any():  # a training starts these at zero, which would leave the noise as it is
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return Pipeline(parts).save_pretrained(folder, "official")


def main() -> int:
    """The command line; a folder that is there already is kept."""
    parser = argparse.ArgumentParser(prog="python -m mmdit.demo.seeded", description="Write a random checkpoint.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not folder.exists():
        write_seeded(folder)
    print(f"{folder}: random weights in the official layout; pictures drawn with it mean nothing")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
