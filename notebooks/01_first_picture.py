# %% [markdown]
# # A first picture, and what happens inside
#
# Everything here runs on the embedded model, a Stable Diffusion 3.5 with four blocks that comes with the package.

# %%
import os

import matplotlib.pyplot as plt
import torch

import mmdit
from mmdit import plots

torch.set_grad_enabled(False)
QUICK = os.environ.get("MMDIT_QUICK") == "1"
STEPS = 2 if QUICK else 20
PROMPT = "a large red circle above a blue star, on a white background"

# %%
pipe = mmdit.Pipeline.demo()
# With official weights, this one line changes and nothing else:
# pipe = mmdit.Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-large", device="cuda", dtype=torch.bfloat16)

# %%
picture = pipe(PROMPT, seed=7, num_inference_steps=STEPS, guidance_scale=4.5).images[0]
figure, axis = plt.subplots(figsize=(3, 3))
axis.imshow(picture)
axis.set_axis_off()

# %% [markdown]
# ## The same, step by step
# Three text encoders turn the prompt into tokens, and the sampler turns noise into a latent, one noise level at a time.
# `step.denoised` is the picture that the model predicts at that step: first a blur, then the layout, then the edges.

# %%
cond, uncond = pipe.encode(PROMPT), pipe.encode("")
print("context", tuple(cond.context.shape), "pooled", tuple(cond.pooled.shape))
steps = list(pipe.sample(cond, uncond, pipe.noise(7), num_inference_steps=STEPS, guidance_scale=4.5))
shown = steps[:: max(1, STEPS // 5)]
figure, axes = plt.subplots(1, len(shown), figsize=(2 * len(shown), 2.4))
for axis, step in zip(axes, shown, strict=True):
    axis.imshow(pipe.decode(step.denoised)[0].permute(1, 2, 0).float().cpu())
    axis.set_title(f"step {step.i}, to {step.sigma:.2f}", fontsize=9)
    axis.set_axis_off()

# %% [markdown]
# ## Named activations
# Every activation has a name that follows the official checkpoint keys. `mmdit.points` lists them without running the
# model.

# %%
print(mmdit.points(pipe, "joint_blocks.1.x_block.*", height=128, width=128))

# %%
every = "joint_blocks.*.x_block.resid_post"
with mmdit.capture(pipe, every, branch="cond", reduce=mmdit.reducers.norm()) as seen:
    pipe(PROMPT, seed=7, num_inference_steps=STEPS, guidance_scale=4.5)
norms = torch.stack([values.float().mean((1, 2)) for values in seen.values()])
plots.layer_step_grid(norms.T, label="norm of the residual stream, mean over tokens")

# %% [markdown]
# ## Change something
# Here the output of head 2 in block 1 is set to zero during the first half of the steps.

# %%
with mmdit.patch(pipe, "joint_blocks.1.x_block.attn.z", ablate="zero", heads=[2], steps=slice(0, STEPS // 2)):
    changed = pipe(PROMPT, seed=7, num_inference_steps=STEPS, guidance_scale=4.5).images[0]
figure, axes = plt.subplots(1, 2, figsize=(5, 2.7))
for axis, one, title in zip(axes, (picture, changed), ("unchanged", "without head 2 of block 1"), strict=True):
    axis.imshow(one)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()
