"""Forty drawings of the embedded model as digests, to show that a change of the code moved no number.

    python tests/equal_drawings.py record FILE     # with the code as it was
    python tests/equal_drawings.py compare FILE    # with the code as it is, on the same machine

The drawings cover every profile, ten samplers, quantization on and off, kinds of guidance, capture and patch. A digest
is that of the final latent's bytes and of the 8-bit picture's bytes, so equal digests are equal bit for bit. Exit code:
0 where all are equal, 1 where one is not.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the order of sums depends on the number of threads

import numpy as np
import torch

import mmdit

PROMPTS = ("a large red circle above a blue star, on a white background", "two green triangles and a (pink cross:1.2)")
SAMPLERS = (
    ("euler", "normal"),
    ("heun", "karras"),
    ("dpmpp_2m", "beta"),
    ("dpmpp_2m_sde", "simple"),
    ("euler_ancestral", "normal"),
    ("uni_pc", "sgm_uniform"),
    ("deis", "exponential"),
    ("lcm", "linear_quadratic"),
    ("res_multistep", "kl_optimal"),
    ("euler_cfg_pp", "ddim_uniform"),
)
POINT = "joint_blocks.1.x_block.attn.z"


def cases() -> dict[str, dict[str, Any]]:
    """The arguments of each drawing, by name; `quant` and `look` are ours, the rest goes to the pipeline."""
    found: dict[str, dict[str, Any]] = {}
    for profile in ("diffusers", "comfyui", "reference"):
        for sampler, schedule in SAMPLERS:
            found[f"{profile} {sampler} {schedule}"] = {"profile": profile, "sampler": sampler, "schedule": schedule}
    for quant in ("fp8", "fp8-tensor", "fp8-weight-only", "fp8-e5m2"):
        found[f"quant {quant}"] = {"quant": quant}
    found["guidance apg"] = {"guidance": mmdit.Guidance(kind="apg", momentum=-0.5)}
    found["guidance rescaled, in an interval"] = {"guidance": mmdit.Guidance(rescale=0.7, interval=(0.1, 0.9))}
    found["skip layers"] = {"skip_guidance_layers": [1, 2]}
    found["perturbed attention"] = {"guidance": mmdit.Guidance(perturbed_layers=(1,))}
    for look in ("capture", "patch", "attention_maps"):
        found[look] = {"look": look}
    return found


def looking(pipe: mmdit.Pipeline, look: str | None) -> AbstractContextManager[Any]:
    """The context in which a drawing is looked into or changed."""
    if look == "capture":
        return mmdit.capture(pipe, "joint_blocks.*.x_block.resid_post", reduce=mmdit.reducers.norm())
    if look == "patch":
        return mmdit.patch(pipe, POINT, ablate="zero", heads=[2], steps=slice(0, 2))
    return nullcontext() if look is None else mmdit.attention_maps(pipe, ["red", "circle"])


def digests() -> dict[str, str]:
    """The digest of every drawing, by its name."""
    found, pipes = {}, {}
    for name, case in cases().items():
        built = case.pop("profile", "diffusers"), case.pop("quant", None)
        if built not in pipes:
            pipes[built] = mmdit.Pipeline.demo(profile=built[0], quant=built[1])
        pipe, look = pipes[built], case.pop("look", None)
        prompts = PROMPTS[0] if look else list(PROMPTS)
        seed = 7 if look else [7, 8]
        how = {"height": 96, "width": 128, "num_inference_steps": 4, "guidance_scale": 4.5, "seed": seed, **case}
        with looking(pipe, look):
            latent = pipe(prompts, output_type="latent", progress=False, **how).images
        pictures = pipe(prompts, progress=False, **how).images
        digest = sha256(latent.float().numpy().tobytes())
        for picture in pictures:
            digest.update(np.asarray(picture).tobytes())
        found[name] = digest.hexdigest()
    return found


def main() -> int:
    """Record the digests in a file, or hold them against one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = digests()
    if options.what == "record":
        options.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"recorded {len(found)} drawings in {options.file}")
        return 0
    wanted = json.loads(options.file.read_text(encoding="utf-8"))
    differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    print(
        "\n".join(f"differs: {name}" for name in differing) + f"\n{len(found) - len(differing)} of {len(found)} equal"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
