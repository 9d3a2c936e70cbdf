# %% [markdown]
# # A ControlNet: what it adds, where, and how long
#
# A ControlNet is a second, smaller net beside the transformer. It reads a hint (here the edges of a picture) and adds a
# residual to the image tokens after each block. `mmdit.CANNY_NET` is one of the embedded model. The captions below leave
# out what the hint says: shapes and where they are. They are drawn with guidance 2: the usual 4.5 multiplies what the
# caption says, and colours what it leaves open, so that more objects are lost
# ([how many](../src/mmdit/demo/README.md#the-controlnets)).

# %%
import os

import matplotlib.pyplot as plt
import torch

import mmdit

torch.set_grad_enabled(False)
torch.manual_seed(0)
QUICK = os.environ.get("MMDIT_QUICK") == "1"
SIDE = 64 if QUICK else 128
PROMPT = "a large red circle above a blue star, on a white background"
VAGUE = "a green shape and a yellow shape on a black background"
HOW = {"seed": 7, "num_inference_steps": 3 if QUICK else 14, "height": SIDE, "width": SIDE, "max_sequence_length": 77}
WITH_NET = {**HOW, "guidance_scale": 2.0}

pipe = mmdit.Pipeline.demo(profile="comfyui")
# With official weights, this one line changes and the file of the net:
# pipe = mmdit.Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-large", device="cuda", dtype=torch.bfloat16)


def show(pictures, titles):
    """Pictures of a call, or hints [h, w], in one row."""
    _, axes = plt.subplots(1, len(pictures), figsize=(2.4 * len(pictures), 2.7))
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        axis.imshow(picture, cmap="gray")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()


# %% [markdown]
# ## The hint
# `mmdit.canny` finds edges as ComfyUI's node does. The first edges are those of a picture that the model draws itself.

# %%
drawn = pipe(PROMPT, **HOW).images[0]
edges = mmdit.canny(drawn, 0.05, 0.1)
show([drawn, edges[0, ..., 0]], ["a picture", "its edges, the hint"])

# %% [markdown]
# ## The net
# It is of Stability's kind: blocks of the image tokens alone, which start from the transformer's own tokens, and one
# Linear after each block whose output is the residual. Here one block serves all four of the transformer.

# %%
net = mmdit.load_controlnet(mmdit.CANNY_NET, dtype=torch.float32)
print(f"{sum(weight.numel() for weight in net.parameters()) / 1e6:.1f} M parameters, kind {net.config.kind}")

# %%
CONTROL = {"controlnet": net, "control_image": edges}
scales = (0.0, 1.0) if QUICK else (0.0, 0.5, 1.0, 2.0)
found = [pipe(VAGUE, controlnet_conditioning_scale=scale, **CONTROL, **WITH_NET).images[0] for scale in scales]
show(found, [f"scale {scale}" for scale in scales])

# %% [markdown]
# ## With and without, by block
# How far the net moves the residual stream of the image. `resid_post` is the output of a block, and a residual is added
# after it: the first block does not know of the net yet.

# %%
every = "joint_blocks.*.x_block.resid_post"
with mmdit.capture(pipe, every, branch="cond", steps=[0]) as with_net:
    pipe(VAGUE, **CONTROL, **WITH_NET)
with mmdit.capture(pipe, every, branch="cond", steps=[0]) as without:
    pipe(VAGUE, **WITH_NET)
for name in with_net:
    one, other = (torch.as_tensor(seen[name]).float() for seen in (with_net, without))
    print(f"{name}: {float((one - other).norm() / other.norm()):.3f}")

# %% [markdown]
# ## Inside of the net
# `pipe.controlnet = net` shows the net's own points to `capture` and `patch`.

# %%
pipe.controlnet = net
points = [row.name for row in mmdit.points(pipe) if row.name.startswith("controlnet.")]
print(f"{len(points)} points, such as {', '.join(points[:3])}")
with mmdit.capture(pipe, "controlnet.*.resid_post", branch="cond", steps=[0]) as inside:
    pipe(VAGUE, **CONTROL, **WITH_NET)
for name in inside:
    print(f"{name}: norm {float(torch.as_tensor(inside[name]).float().norm()):.1f}")

# %% [markdown]
# ## When it acts
# `control_guidance_start` and `control_guidance_end` are shares of the way from noise to picture.

# %%
windows = ((0.0, 1.0), (0.0, 0.3)) if QUICK else ((0.0, 1.0), (0.0, 0.3), (0.3, 0.6), (0.6, 1.0))
moved = []
base = pipe(VAGUE, output_type="pt", **WITH_NET).images
for start, end in windows:
    window = {"control_guidance_start": start, "control_guidance_end": end}
    picture = pipe(VAGUE, output_type="pt", **CONTROL, **window, **WITH_NET).images
    moved.append(picture[0].permute(1, 2, 0))
    print(f"from {start} to {end}: pixels move by {float((picture - base).abs().mean()):.3f}")
show(moved, [f"{start} to {end}" for start, end in windows])

# %%
