# %% [markdown]
# # FP8: which layers cause the error, and what each recipe does about it
#
# A float8 Linear rounds its weight once and its input at every step. For normally distributed numbers, theory predicts an
# SNR of 31.5 dB after rounding to E4M3, 28.5 dB for a product with both factors in E4M3, and 25.6 dB for E5M2 weights. A
# layer that stays below that has outliers in its input.

# %%
import copy
import os

import matplotlib.pyplot as plt
import torch

import mmdit
import quant
from mmdit import plots
from mmdit.demo.captions import prompts as make_prompts

torch.set_grad_enabled(False)
QUICK = os.environ.get("MMDIT_QUICK") == "1"
STEPS = 1 if QUICK else 20
PROMPT = "a large red circle above a blue star, on a white background"
HOW = {"seed": 7, "num_inference_steps": STEPS, "guidance_scale": 4.5}
CALIBRATION = make_prompts(1 if QUICK else 8, 3, held_out=False)

# %%
load = mmdit.Pipeline.demo
# With official weights, this one line changes and nothing else:
# load = lambda: mmdit.Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-large", device="cuda", dtype=torch.bfloat16)
pipe = load()
truth = pipe(PROMPT, **HOW, output_type="pt").images[0]
original = copy.deepcopy(pipe.transformer)

# %% [markdown]
# ## Quantize, and read the report

# %%
print(quant.quantize_(pipe.transformer, "fp8"))

# %% [markdown]
# ## The error of each layer at each step
# Each layer is measured on the input that it received, so its SNR shows the error of this layer alone and not the error
# of the layers before it.

# %%
errors = mmdit.float8_errors(pipe, PROMPT, original, **HOW)
print(errors)
plots.layer_step_grid(errors.grid("snr").T, label="SNR of the output, dB", down="layer")

# %% [markdown]
# ## Which layer changes the picture most
# One layer at a time is quantized, and the picture is drawn again.

# %%
pipe = load()
some = [
    name for name, _ in quant.linears_of(pipe.transformer) if name.startswith("joint_blocks") and "adaLN" not in name
]
blame = mmdit.float8_blame(pipe, PROMPT, "fp8", layers=some[::16] if QUICK else some, **HOW)
figure, axis = plt.subplots(figsize=(5, 5))
axis.barh(list(blame)[:12][::-1], list(blame.values())[:12][::-1], color="#0072B2")
axis.set_xlabel("PSNR to the picture without quantization, dB")
axis.tick_params(labelsize=7)
figure.tight_layout()

# %% [markdown]
# ## Recipes side by side
# Static scales are calibrated on other prompts. Mean folding subtracts the mean of a layer's input before it is rounded.


# %%
def drawn(recipe, **options):
    """The picture and its PSNR to the one without quantization."""
    pipe = load()
    if options or recipe == "fp8-static":
        mmdit.quantize_static(pipe, CALIBRATION, STEPS, recipe=recipe, guidance_scale=4.5, **options)
    else:
        quant.quantize_(pipe.transformer, recipe)
    picture = pipe(PROMPT, **HOW, output_type="pt").images[0]
    return picture, float(-10 * (picture - truth).square().mean().log10())


rows = {"weight-only": drawn("fp8-weight-only"), "per token and row": drawn("fp8"), "E5M2 weights": drawn("fp8-e5m2")}
rows |= {"static": drawn("fp8-static"), "static, mean folded": drawn("fp8-static", mean=True)}
figure, axes = plt.subplots(1, len(rows) + 1, figsize=(2 * (len(rows) + 1), 2.6), layout="constrained")
for axis, (name, (picture, ratio)) in zip(axes, [("not quantized", (truth, None)), *rows.items()], strict=True):
    axis.imshow(picture.permute(1, 2, 0).float().cpu())
    axis.set_title(name if ratio is None else f"{name}\n{ratio:.1f} dB", fontsize=8)
    axis.set_axis_off()
