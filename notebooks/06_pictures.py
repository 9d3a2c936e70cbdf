# %% [markdown]
# # Pictures as input: image to image, inpaint, inversion
#
# A drawing can start from a picture instead of noise. This notebook shows what then happens to the latents at each step: how
# much of the picture a noise level leaves, what a mask holds still and when, and how the flow's ODE leads from a picture back
# to the noise that it is drawn from.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

import mmdit
from mmdit import images
from mmdit.demo.score import parse_batch, score_batch

torch.set_grad_enabled(False)
QUICK = os.environ.get("MMDIT_QUICK") == "1"
STEPS = 2 if QUICK else 20
SEEDS = [1] if QUICK else list(range(1, 9))
RED = "a large red circle above a blue star, on a white background"
GREEN = "a large green circle above a blue star, on a white background"

# %%
pipe = mmdit.Pipeline.demo(profile="comfyui")
# With official weights, this one line changes and nothing else:
# pipe = mmdit.Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-large", device="cuda", dtype=torch.bfloat16)


# %%
def show(rows, titles):
    """Rows of pictures [3, h, w] in [0, 1] or of PIL pictures, with a title for each column."""
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(1.2 * len(titles), 1.35 * len(rows)), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=7)
    for line, pictures in zip(axes, rows, strict=True):
        for axis, one in zip(line, pictures, strict=True):
            axis.imshow(one.permute(1, 2, 0).float().cpu() if isinstance(one, torch.Tensor) else one)
            axis.set_axis_off()
    figure.tight_layout()


def decoded(latents):
    """The picture [3, h, w] of latents [1, c, h, w]."""
    return pipe.decode(latents)[0]


def noisy(latents, sigma):
    """What a drawing from a picture has at a noise level: sigma noise + (1 - sigma) latents."""
    return sigma * noise + (1 - sigma) * latents


def some(items):
    """At most six of them, evenly spaced, with the last."""
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, min(6, len(items)))]


how = {"num_inference_steps": STEPS, "guidance_scale": 4.5}
picture = pipe(RED, seed=7, **how).images[0]
red, green, nothing = (pipe.encode(prompt) for prompt in (RED, GREEN, ""))
noise = pipe.noise(3)
image = pipe.encode_image(picture)  # the mean of the VAE's distribution, as the profile "comfyui" has it
show([[picture, decoded(image)]], ["the picture", "encoded, decoded"])

# %% [markdown]
# ## Image to image
# The drawing begins at the noise level that the strength asks for: sigma noise + (1 - sigma) image. Above: this start.
# Below: what the prompt "a large green circle ..." makes of it. The layout is settled at high noise levels, so it comes from
# the picture unless the strength is near 1; the colour follows the prompt earlier.

# %%
STRENGTHS = (0.4, 1.0) if QUICK else (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
first = [float(pipe.sigmas(STEPS, strength=strength)[0]) for strength in STRENGTHS]
ends = [list(pipe.sample(green, nothing, noise, image=image, strength=strength, **how))[-1].x for strength in STRENGTHS]
titles = [f"strength {strength}\nfrom {sigma:.2f}" for strength, sigma in zip(STRENGTHS, first, strict=True)]
show([[decoded(noisy(image, sigma)) for sigma in first], [decoded(end) for end in ends]], titles)

# %% [markdown]
# The same, counted over several seeds: which share of the prompt's statements holds, and how far the shapes are from where
# the picture has them.

# %%
before = {one.shape: one for one in parse_batch(pipe.decode(image).float().cpu())[0].objects}
followed, moved = [], []
for strength in STRENGTHS:
    drawn = pipe([GREEN] * len(SEEDS), image=picture, strength=strength, seed=SEEDS, output_type="pt", **how).images
    verdicts = [holds for each in score_batch(drawn.float().cpu(), [GREEN] * len(SEEDS)) for holds in each.values()]
    followed.append(sum(verdicts) / len(verdicts))
    found = [one for parsed in parse_batch(drawn.float().cpu()) for one in parsed.objects if one.shape in before]
    ways = [np.hypot(one.x - before[one.shape].x, one.y - before[one.shape].y) for one in found]
    moved.append(np.mean(ways) if ways else np.nan)
figure, (left, right) = plt.subplots(1, 2, figsize=(6.5, 2.4))
left.plot(STRENGTHS, followed, marker="o", color="tab:green")
left.set_ylabel("statements of the prompt\nthat hold")
left.set_ylim(0, 1.05)
right.plot(STRENGTHS, moved, marker="o", color="tab:red")
right.set_ylabel("shapes off the picture's,\npixels")
for axis in (left, right):
    axis.set_xlabel("strength")
figure.tight_layout()

# %% [markdown]
# Step by step at strength 0.8: the latent (above), and the picture that the model predicts from it (below).

# %%
steps = some(list(pipe.sample(green, nothing, noise, image=image, strength=0.8, **how)))
titles = [f"step {step.i}\nto {step.sigma:.2f}" for step in steps]
show([[decoded(step.x) for step in steps], [decoded(step.denoised) for step in steps]], titles)

# %% [markdown]
# ## Inpaint
# The mask says where the picture is drawn anew. `mmdit.images` makes one of what is red, grown by a few pixels. The latents
# see it at an eighth of its size, with grays at its edge.

# %%
pixels = images.load_image(picture).picture
reddish = (pixels[..., 0] - pixels[..., 1:].amax(-1)).clamp(min=0)
mask = images.grow_mask(images.threshold_mask(reddish, 0.3), 6)
small = pipe.encode_mask(mask, image)
show([[picture, mask.expand(3, -1, -1), small[0].expand(3, -1, -1)]], ["picture", "mask", "at the latents"])

# %% [markdown]
# In the profile "comfyui" the outside of the mask is set to the noisy picture before every model call, and the prediction
# there to the picture itself after it; the model sees a consistent whole at every level. Above: the latent after each step,
# below: the prediction.

# %%
inside = list(pipe.sample(green, nothing, noise, image=image, mask=small, strength=1.0, **how))
steps = some(inside)
titles = [f"step {step.i}\nto {step.sigma:.2f}" for step in steps]
show([[decoded(step.x) for step in steps], [decoded(step.denoised) for step in steps]], titles)

# %% [markdown]
# diffusers sets the outside once, after each step, and leaves the prediction alone: the prediction differs from the picture
# out there until the end. Neither lays the pixels of the picture over the result; `keep_outside=True` does.


# %%
def off_outside(steps):
    """How far each prediction is from the picture where the mask is 0, relative to the picture."""
    outside = (small == 0).to(image)
    return [float(((step.denoised - image) * outside).norm() / (image * outside).norm()) for step in steps]


pipe.profile = mmdit.PROFILES["diffusers"]
others = list(pipe.sample(green, nothing, noise, image=image, mask=small, strength=1.0, **how))
pipe.profile = mmdit.PROFILES["comfyui"]
figure, axis = plt.subplots(figsize=(5, 2.6))
for name, steps in (("comfyui", inside), ("diffusers", others)):
    axis.plot([step.i for step in steps], off_outside(steps), marker=".", label=name)
axis.set_xlabel("step")
axis.set_ylabel("prediction off the picture,\noutside of the mask")
axis.legend(fontsize=8)
figure.tight_layout()

# %%
masked = {"image": picture, "mask_image": mask, "strength": 1.0, "seed": 3, **how}
results = {"drawn": pipe(GREEN, **masked).images[0]}
results["keep_outside"] = pipe(GREEN, **masked, keep_outside=True).images[0]
for name, one in results.items():
    apart = np.abs(np.asarray(one, float) - np.asarray(picture, float))[mask[0].numpy() == 0]
    print(f"{name}: outside of the mask {apart.mean():.2f} grey levels off on average, at most {apart.max():.0f}")
show([[picture, *results.values()]], ["the picture", *results])

# %% [markdown]
# ## Inversion
# The sampler integrates dx/dsigma = v from noise to a picture. Backwards, the same ODE leads from the picture to the noise
# that this prompt draws it from. Here is the path. Its end is not quite what a seed gives:
# compare its standard deviation with 1.

# %%
inverse = pipe.invert(picture, RED, num_inference_steps=STEPS)
path = some(list(zip(inverse.sigmas.tolist(), inverse.trajectory, strict=True)))
show([[decoded(x) for _, x in path]], [f"at {sigma:.2f}" for sigma, _ in path])
print(
    f"the last latent: mean {inverse.latents.mean():+.3f}, standard deviation {inverse.latents.std():.3f} (noise: 0, 1)"
)


# %%
def redrawn(found, cond, scale=1.0):
    """The latents that are drawn from what was inverted."""
    against = None if scale == 1 else nothing
    again = {"sigmas": found.falling, "guidance_scale": scale, "sampler": "heun", "add_noise": False}
    return list(pipe.sample(cond, against, found.latents, **again))[-1].x


counts = (2,) if QUICK else (5, 10, 20, 40)
for sampler in ("euler", "heun"):
    errors = []
    for count in counts:
        found = pipe.invert(picture, RED, num_inference_steps=count, sampler=sampler)
        errors.append(float((redrawn(found, red) - image).norm() / image.norm()))
    print(f"{sampler}: " + ", ".join(f"{count} steps {error:.4f}" for count, error in zip(counts, errors, strict=True)))

# %% [markdown]
# The numbers are relative errors of the latents that are drawn again. Under another prompt, the inverted noise keeps the
# layout; noise of a seed does not. Inverted only part of the way, more of the picture stays.

# %%
fresh = pipe(GREEN, seed=11, **how).images[0]
part = pipe.invert(picture, RED, num_inference_steps=STEPS, strength=0.6)
shown = [
    picture,
    decoded(redrawn(inverse, red)),
    decoded(redrawn(inverse, green, 2.0)),
    decoded(redrawn(part, green, 2.0)),
]
show(
    [[*shown, fresh]],
    ["the picture", "drawn again", "as green", "green, from\n0.6 of the way", "green, from\nanother noise"],
)
