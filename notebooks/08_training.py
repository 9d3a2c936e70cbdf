# %% [markdown]
# # Train a LoRA, and see where it acts
#
# Two minutes on one CPU core: the embedded model learns to draw outlines in place of filled shapes. The loop is written
# out from the parts of `mmdit.training`; `mmdit train lora CONFIG.json` is the same with checkpoints and a log.

# %%
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import torch

import mmdit
from mmdit import plots
from mmdit.demo.captions import training_captions
from mmdit.demo.outlines import hollowness, outlined, sample_outlined
from mmdit.training.adapters import detach
from mmdit.training.batches import InMemory, Sample
from mmdit.training.config import TrainingConfig
from mmdit.training.export import write_lora
from mmdit.training.loop import block_norms, flow_losses, set_rate
from mmdit.training.rates import rate_at
from mmdit.training.run import loss_by_time
from mmdit.training.setup import start

QUICK = os.environ.get("MMDIT_QUICK") == "1"
SCENES, STEPS, SECONDS = (4, 2, 1) if QUICK else (256, 600, 120)
PROMPT = "a large red circle above a large blue square, on a white background"
HOW = {"seed": 7, "num_inference_steps": 2 if QUICK else 14, "max_sequence_length": 77, "output_type": "pt"}

# %% [markdown]
# ## Data
# Pictures and captions, encoded once. For a folder of pictures, `mmdit.training.data.encoded` does this, in buckets of
# different shapes, and keeps the result in files.

# %%
torch.manual_seed(0)
pipe = mmdit.Pipeline.demo()
# With official weights, this one line changes, and the config's size, text_tokens and quant:
# pipe = mmdit.Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-large", device="cuda", dtype=torch.bfloat16)
scenes = sample_outlined(SCENES, 0)
pictures = outlined(scenes)
captions = [texts[0] for texts in training_captions(scenes, 1, 0)]
samples = []
with torch.no_grad():
    for first in range(0, SCENES, 32):
        some = slice(first, first + 32)
        latents = pipe.vae.encode(2 * pictures[some] - 1).mode()
        texts = pipe.encode(captions[some], max_sequence_length=77)
        samples += [Sample(one, None, *text) for one, *text in zip(latents, texts.context, texts.pooled, strict=True)]
    empty = pipe.encode([""], max_sequence_length=77)
data = InMemory(samples, (empty.context[0], empty.pooled[0]))
print(f"{SCENES} pictures, latents {tuple(latents.shape[1:])}, captions such as {captions[0]!r}")

# %% [markdown]
# ## Adapters
# A LoRA of rank 4 beside the Linears of the image stream. The model computes with them from here on, and nothing changes
# yet, because one of the two factors of each is zero.

# %%
plain = pipe(PROMPT, **HOW).images
config = TrainingConfig(
    rank=4,
    targets=("joint_blocks.*.x_block.attn.*", "joint_blocks.*.x_block.mlp.*"),
    split_qkv=False,
    batch_size=8,
    steps=STEPS,
    learning_rate=2e-3,
    schedule="cosine",
    warmup=20,
    dtype="float32",
    device="cpu",
    checkpoint_blocks=False,
)
run, trained = start(config, pipe=pipe, samples=data)
count = sum(one.numel() for one in run.parameters.values())
print(f"{len(trained.adapters)} Linears, {count} parameters of {sum(p.numel() for p in pipe.transformer.parameters())}")
print("starts at the base model:", torch.equal(pipe(PROMPT, **HOW).images, plain))

# %% [markdown]
# ## The loop
# What every step does: a batch (its noise and times follow from the seed and the step), the loss, its gradients, a step of
# the optimizer. The run ends by the clock or by the number of steps, whichever is first.

# %%
history, norms, times, losses = [], [], [], []
began = time.process_time()  # of the processor, so that a busy machine trains as long
for step in range(STEPS):
    done = max(step / STEPS, (time.process_time() - began) / SECONDS)
    if done >= 1:
        break
    set_rate(run.optimizer, rate_at(int(done * 1000), 1000, peak=2e-3, warmup=20, schedule="cosine"))
    batch = run.batch(step)
    each = flow_losses(run.model, batch)
    each.mean().backward()
    norms.append(block_norms(run.parameters))
    torch.nn.utils.clip_grad_norm_(list(run.parameters.values()), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    history.append(float(each.mean().detach()))
    times.append(batch.t)
    losses.append(each.detach())
print(f"{len(history)} steps in {time.process_time() - began:.0f} s of the processor")

# %% [markdown]
# ## Loss
# A single batch says little: the loss depends on the time far more than on the state of the training. So the loss is also
# shown by time, for the first and the last third of the steps.

# %%
third = max(1, len(history) // 3)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
left.plot(history, alpha=0.3)
smooth = torch.tensor(history).unfold(0, min(50, len(history)), 1).mean(1)
left.plot(range(len(history) - len(smooth), len(history)), smooth)
left.set(xlabel="step", ylabel="loss", title="loss of each batch, and its mean over 50")
for name, part in (("first", slice(0, third)), ("last", slice(-third, None))):
    bins = loss_by_time(torch.cat(times[part]), torch.cat(losses[part]), 5)
    middle.plot(list(bins), list(bins.values()), "o-", label=f"{name} third")
middle.set(title="loss by time (1 is noise)", yscale="log")
middle.tick_params(axis="x", labelrotation=30)
for block in norms[0]:
    right.plot([float(one[block]) for one in norms], alpha=0.7, label=block)
right.set(xlabel="step", title="norm of the gradients by block", yscale="log")
for axis in (middle, right):
    axis.legend(fontsize=8)

# %% [markdown]
# ## What it draws, and where it acts
# The trained adapters are still attached. The same prompt and noise, before and after; then the change of each Linear,
# relative to its weight.

# %%
after = pipe(PROMPT, **HOW).images
figure, axes = plt.subplots(1, 2, figsize=(5.2, 2.9))
for axis, picture, name in zip(axes, (plain, after), ("before", "after"), strict=True):
    axis.imshow(picture[0].permute(1, 2, 0))
    axis.set_title(f"{name}: hollow {float(hollowness(picture)):.2f}", fontsize=9)
    axis.set_axis_off()

# %%
every = "joint_blocks.*.x_block.resid_post"
with mmdit.capture(pipe, every, branch="cond", steps=[0]) as on:
    pipe(PROMPT, **HOW)

# %% [markdown]
# ## The file
# What the run wrote is a LoRA like any other: in the names of diffusers, ComfyUI or kohya. Here it is read from memory.

# %%
with TemporaryDirectory() as folder:
    lora = mmdit.load_lora(write_lora(trained.adapters, Path(folder) / "outlines.safetensors", config))
detach(pipe.transformer, list(trained.adapters))
print(*repr(lora).splitlines()[1:4], sep="\n")
plots.lora_norms(mmdit.lora_norms(lora, pipe.models), title="change over weight")

# %% [markdown]
# How far the LoRA moves the residual stream of the image after each block, in the first step.

# %%
with mmdit.capture(pipe, every, branch="cond", steps=[0]) as off:
    pipe(PROMPT, **HOW)
for name in on:
    one, other = (torch.as_tensor(seen[name]).float() for seen in (on, off))
    print(f"{name}: {float((one - other).norm() / other.norm()):.3f}")
print("without adapters the base model is back:", torch.equal(pipe(PROMPT, **HOW).images, plain))
