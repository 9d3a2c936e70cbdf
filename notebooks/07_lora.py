# %% [markdown]
# # A LoRA: what it changes, where, and how much
#
# `mmdit.OUTLINES` is a LoRA of the embedded model. It draws outlines in place of filled shapes.

# %%
import os

import matplotlib.pyplot as plt
import torch

import mmdit
from mmdit import plots
from mmdit.demo.outlines import hollowness

torch.set_grad_enabled(False)
QUICK = os.environ.get("MMDIT_QUICK") == "1"
PROMPT = "a large red circle above a large blue square, on a white background"
HOW = {"seed": 7, "num_inference_steps": 2 if QUICK else 14, "max_sequence_length": 77, "output_type": "pt"}

# %% [markdown]
# ## What the file holds
# The producer, the kind, the rank, what it fits, and every key that is not used, with the reason.

# %%
lora = mmdit.load_lora(mmdit.OUTLINES)
print(*repr(lora).splitlines()[1:], sep="\n")

# %%
pipe = mmdit.Pipeline.demo()
# With official weights, this one line changes and nothing else but the LoRA, which is one of theirs:
# pipe = mmdit.Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-large", device="cuda", dtype=torch.bfloat16)
plots.lora_norms(mmdit.lora_norms(lora, pipe.models), title="change over weight")

# %% [markdown]
# ## Weights
# The LoRA stands beside the Linears, so that its weight changes in no time and the model's weights stay as they are.

# %%
pipe.load_lora_weights(lora, "outlines")
weights = (0.0, 1.0) if QUICK else (0.0, 0.5, 1.0)
figure, axes = plt.subplots(1, len(weights), figsize=(2.4 * len(weights), 2.8))
for axis, weight in zip(axes, weights, strict=True):
    pipe.set_adapters("outlines", weight)
    picture = pipe(PROMPT, **HOW).images
    axis.imshow(picture[0].permute(1, 2, 0))
    axis.set_title(f"weight {weight}, hollow {float(hollowness(picture)):.2f}", fontsize=9)
    axis.set_axis_off()

# %% [markdown]
# ## Which block decides
# The LoRA acts in one block at a time.

# %%
pipe.set_adapters("outlines", 1.0)
BLOCKS = ["joint_blocks.0", "joint_blocks.1"] if QUICK else None
found = mmdit.sweep_lora(pipe, "outlines", lambda: hollowness(pipe(PROMPT, **HOW).images)[0], blocks=BLOCKS)
for block, value in zip(found.axes["block"], found.values.tolist(), strict=True):
    print(f"{block}: hollow {value:.2f}")

# %% [markdown]
# ## With and without, inside
# How far the LoRA moves the residual stream of the image, by block.

# %%
every = "joint_blocks.*.x_block.resid_post"
with mmdit.capture(pipe, every, branch="cond", steps=[0]) as on:
    pipe(PROMPT, **HOW)
with pipe.without_lora(), mmdit.capture(pipe, every, branch="cond", steps=[0]) as off:
    pipe(PROMPT, **HOW)
for name in on:
    one, other = (torch.as_tensor(seen[name]).float() for seen in (on, off))
    print(f"{name}: {float((one - other).norm() / other.norm()):.3f}")

# %%
pipe.unload_lora_weights()
print(pipe.lora_report())
