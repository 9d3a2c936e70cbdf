# %% [markdown]
# # Samplers: trajectories and error
#
# A sampler integrates dx/dsigma = v from noise (sigma 1) to a picture (sigma 0). All samplers solve the same ODE; with few
# model calls they end at different points. (Ancestral and SDE samplers add fresh noise, so they end in other pictures, and
# no error against a single solution can be given for them.)

# %%
import os

import matplotlib.pyplot as plt
import torch

import mmdit
import samplers

torch.set_grad_enabled(False)
QUICK = os.environ.get("MMDIT_QUICK") == "1"
COUNTS = (2, 4) if QUICK else (4, 6, 8, 12, 20, 32)
FINE = 6 if QUICK else 100
NAMES = ("euler", "heun", "dpmpp_2m", "flow_dpmpp_2m", "deis")
PROMPT = "a large red circle above a blue star, on a white background"

# %%
pipe = mmdit.Pipeline.demo()
# With official weights, this one line changes and nothing else:
# pipe = mmdit.Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-large", device="cuda", dtype=torch.bfloat16)

# %% [markdown]
# ## Schedules
# Schedules differ in the noise levels at which they take their steps.

# %%
figure, axis = plt.subplots(figsize=(5, 3))
for name in ("normal", "simple", "karras", "beta", "exponential"):
    axis.plot(samplers.sigmas(name, 20), marker=".", label=name)
axis.set_xticks(range(0, 21, 5))
axis.set_xlabel("step")
axis.set_ylabel("sigma")
axis.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## Trajectories
# The paths of one latent, projected onto their first two principal components.

# %%
cond, uncond, noise = pipe.encode(PROMPT), pipe.encode(""), pipe.noise(7)


def path(name, count, schedule="normal"):
    """The latents after every step, [steps, numbers], and how often the model was called."""
    calls = []
    pipe.watchers.append(calls.append)
    try:
        how = {"num_inference_steps": count, "guidance_scale": 4.5, "sampler": name, "schedule": schedule}
        steps = [step.x.flatten().float().cpu() for step in pipe.sample(cond, uncond, noise, **how)]
    finally:
        pipe.watchers.remove(calls.append)
    return torch.stack([noise.flatten().float().cpu(), *steps]), len(calls)


paths = {name: path(name, COUNTS[-1] // 2)[0] for name in NAMES}
every = torch.cat(list(paths.values()))
_, _, directions = torch.pca_lowrank(every, q=2)
figure, axis = plt.subplots(figsize=(5, 3.4))
for name, one in paths.items():
    flat = (one - every.mean(0)) @ directions
    axis.plot(flat[:, 0], flat[:, 1], marker=".", label=name)
axis.set_xlabel("first direction")
axis.set_ylabel("second direction")
axis.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## Error against model calls
# The reference solution is a run of heun with many steps. The error of a solver of order p falls as calls^-p once its steps
# are small.

# %%
truth = path("heun", FINE)[0][-1]
figure, axis = plt.subplots(figsize=(5, 3.4))
for name in NAMES:
    ends = [path(name, count) for count in COUNTS]
    errors = [float((one[-1] - truth).norm() / truth.norm()) for one, _ in ends]
    axis.loglog([calls for _, calls in ends], errors, marker="o", label=name)
axis.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
axis.minorticks_off()
axis.set_xlabel("model calls")
axis.set_ylabel("relative error of the latent")
axis.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## Guidance
# The same starting noise with different ways to combine the conditional and the unconditional prediction.

# %%
kinds = {
    "CFG": None,
    "rescaled": mmdit.Guidance(rescale=0.7),
    "APG": mmdit.Guidance(kind="apg", momentum=-0.5),
    "CFG-Zero*": mmdit.Guidance(kind="zero_star"),
    "skip layer 1": mmdit.Guidance(skip_guidance_layers=(1,)),
}
figure, axes = plt.subplots(1, len(kinds), figsize=(2 * len(kinds), 2.4))
for axis, (name, guidance) in zip(axes, kinds.items(), strict=True):
    how = {"seed": 7, "num_inference_steps": COUNTS[-1] // 2, "guidance_scale": 4.5, "guidance": guidance}
    axis.imshow(pipe(PROMPT, **how).images[0])
    axis.set_title(name, fontsize=9)
    axis.set_axis_off()
