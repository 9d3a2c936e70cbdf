# %% [markdown]
# # Attention: which patches read which word, by block and step
#
# Each patch of the picture has a query, and each word has keys. `attention_maps` records how much of its attention each
# patch gives to the words that you name. The maps are exact, attention still runs in the fused kernel, and the picture is
# bit-equal to one drawn without maps.

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
WORDS = ["red", "circle", "blue", "star"]

# %%
pipe = mmdit.Pipeline.demo()
# With official weights, this one line changes and nothing else:
# pipe = mmdit.Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-large", device="cuda", dtype=torch.bfloat16)

# %%
with mmdit.attention_maps(pipe, WORDS) as maps:
    picture = pipe(PROMPT, seed=7, num_inference_steps=STEPS, guidance_scale=4.5, output_type="pt").images[0]
print(maps.words["circle"].shape, "passes, blocks, samples, rows, columns;", f"{maps.nbytes / 1e3:.0f} kB")

# %% [markdown]
# ## By block
# In block 2 the maps of shapes show where the objects are; the maps of colours do so in block 3. A colour is read at the
# place where the shape was found before.

# %%
blocks = range(pipe.transformer.config.depth)
by_block = {f"{word}, block {i}": maps.of(word, block=i) for word in WORDS for i in blocks}
plots.heat_maps(picture, by_block, columns=len(blocks))

# %% [markdown]
# ## By step
# The map of "circle" in the last block shows the circle before the predicted picture does.

# %%
circle = maps.words["circle"][:, -1, 0]  # passes, rows, columns
shown = range(0, len(circle), max(1, len(circle) // 5))
plots.heat_maps(picture, {f"circle, step {i}": circle[i] for i in shown})

# %% [markdown]
# ## How much each stream reads of the other
# Attention has four quadrants: image patches read patches (I2I) and text (I2T), and text tokens read patches (T2I) and
# text (T2T). The plot shows I2T as a share of all that patches read.

# %%
shares = maps.shares.float().mean(dim=tuple(range(2, maps.shares.ndim - 1)))  # passes, blocks, quadrants
plots.layer_step_grid(shares[..., 1], label="share that patches give to text")

# %%
peak = {word: maps.words[word][:, :, 0].flatten(2).amax(-1).mean(0) for word in WORDS}
figure, axis = plt.subplots(figsize=(4, 2.6))
for word, values in peak.items():
    axis.plot(range(len(values)), values.cpu(), marker="o", label=word)
axis.set_xticks(range(len(values)))
axis.set_xlabel("block")
axis.set_ylabel("largest share of a patch")
axis.legend(fontsize=8)
figure.tight_layout()
