"""The five models with their starting weights, and the trained four as one module from token ids to velocity."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoders.clip import CLIPText
from encoders.clip import Layer as CLIPLayer
from encoders.t5 import Attention as T5Attention
from encoders.t5 import Block as T5Block
from encoders.t5 import Stack as T5Stack
from encoders.t5 import T5Encoder, relative_buckets
from encoders.vae import VAE, ResnetBlock
from mmdit.checkpoints.load_pipeline import Components
from mmdit.demo.data import TokenTable, own_tokenizers
from mmdit.demo.recipe import Architecture
from mmdit.models.blocks import JointBlock
from mmdit.models.mmdit import MMDiT
from mmdit.training.barriers import with_barriers
from mmdit.utils import replacing_folder

__all__ = [
    "QUICK",
    "REGIONS",
    "T5Form",
    "Trainee",
    "compile_regions",
    "graph_breaks",
    "hurried",
    "initial_parts",
    "load_compiled",
    "save_compiled",
    "trainee_of",
]

T5Form = Literal["short", "long", "zeros", "omitted"]
_PIECE = 15 * 2**20
LONG = 256  # T5 tokens of the diffusers profile

# What torch.compile takes at a time: small enough to compile in seconds, and one graph serves all blocks of a kind.
# "models" instead of "blocks" and "text" is one graph of each whole model: fewer passes over memory, longer to compile.
REGIONS: dict[str, tuple[type[nn.Module], ...]] = {
    "blocks": (JointBlock,),
    "text": (CLIPLayer, T5Block),
    "models": (MMDiT, CLIPText, T5Encoder),
    "vae": (ResnetBlock,),
}

# Optimizations that change the result only by rounding; `bench_step` says what each is worth.
QUICK = {
    "graphs": "one CUDA graph per form: a step is one launch instead of a thousand",
    "bf16": "bfloat16 working weights over float32 masters: residual streams, norms and gradients are bfloat16 too",
    "lookup": "gradients of embeddings as a product with one-hot rows: padding repeats one row 50,000 times a batch",
    "plain": "T5's attention as products and a softmax: its bias needs a gradient, which fused kernels are slow at",
}


class Trainee(nn.Module):
    """Token ids and a noised latent to a velocity: `encoders.Conditioner` and the transformer, with gradients."""

    def __init__(self, transformer: MMDiT, clip_l: CLIPText, clip_g: CLIPText, t5: T5Encoder, t5_pad: int) -> None:
        super().__init__()
        self.transformer, self.clip_l, self.clip_g, self.t5, self.t5_pad = transformer, clip_l, clip_g, t5, t5_pad

    def forward(self, latent: Tensor, t: Tensor, tokens: TokenTable, form: T5Form) -> Tensor:
        """The velocity at times t [b] in [0, 1]; `form` says what stands where T5's tokens do."""
        context, pooled = self.condition(tokens, form)
        latent = latent.to(self.transformer.x_embedder.proj.weight.dtype)
        return self.transformer(latent, 1000 * t, context, pooled)

    def condition(self, tokens: TokenTable, form: T5Form) -> tuple[Tensor, Tensor]:
        """Context [b, n, 256] and pooled [b, 192], as `Conditioner` gives them under the diffusers rules."""
        out_l, out_g = self.clip_l(tokens.clip_l.long()), self.clip_g(tokens.clip_g.long())
        context = torch.cat([out_l.penultimate, out_g.penultimate], dim=-1)
        context = F.pad(context, (0, self.transformer.config.context_dim - context.shape[-1]))
        t5_context = self._t5(tokens.t5, form, context)
        return torch.cat([context, t5_context], dim=1), torch.cat([out_l.pooled, out_g.projected], dim=-1)

    def _t5(self, ids: Tensor, form: T5Form, context: Tensor) -> Tensor:
        if form in ("zeros", "omitted"):
            return context.new_zeros(len(ids), LONG if form == "zeros" else 0, context.shape[-1])
        ids = F.pad(ids, (0, LONG - ids.shape[1]), value=self.t5_pad) if form == "long" else ids
        return self.t5(ids.long()).to(context.dtype)


def trainee_of(parts: Components) -> Trainee:
    """The trained four of a pipeline's parts, sharing their weights."""
    assert parts.clip_l and parts.clip_g and parts.t5, "the embedded model has all three"
    assert parts.tokenizers.t5 is not None, "the embedded model has a T5 tokenizer"
    return Trainee(parts.transformer, parts.clip_l, parts.clip_g, parts.t5, parts.tokenizers.t5.pad)


def hurried(trainee: Trainee, quick: Collection[str]) -> None:
    """Exchange modules in place for quicker ones that compute the same; weights and names stay.

    Raises:
        ValueError: a way that `QUICK` does not have.
    """
    if unknown := sorted(set(quick) - QUICK.keys()):
        raise ValueError(f"unknown ways to be quick: {', '.join(unknown)}; known: {', '.join(QUICK)}")
    quicker: dict[type[nn.Module], type[nn.Module]] = {}
    if "lookup" in quick:
        quicker |= {nn.Embedding: SummedEmbedding, T5Stack: SummedStack}
    if "plain" in quick:
        quicker |= {T5Attention: PlainAttention}
    for parent in list(trainee.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in quicker:
                setattr(parent, name, _over_same_parts(quicker[type(child)], child))


def _over_same_parts(subclass: type[nn.Module], module: nn.Module) -> nn.Module:
    """A module of a subclass that adds no state, with the very parameters and submodules of another one."""
    new = subclass.__new__(subclass)
    vars(new).update(vars(module))
    return new


class SummedEmbedding(nn.Embedding):
    """An embedding whose gradient is a product."""

    def forward(self, ids: Tensor) -> Tensor:
        return _Lookup.apply(self.weight, ids)  # type: ignore[no-untyped-call]


class SummedStack(T5Stack):
    """T5's stack with the gradient of its table of biases as a product."""

    def forward(self, x: Tensor) -> Tensor:
        table = self.get_parameter("block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        position = torch.arange(x.shape[1], device=x.device)
        buckets = relative_buckets(position[None, :] - position[:, None], len(table), self.max_distance)
        bias = _Lookup.apply(table, buckets).permute(2, 0, 1).unsqueeze(0).contiguous()  # type: ignore[no-untyped-call]
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class PlainAttention(T5Attention):
    """T5's attention written out, scores kept in the dtype of the stream and their softmax taken in float32."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        shares = torch.softmax((q @ k.transpose(-1, -2)).float() + bias.float(), dim=-1).to(v.dtype)
        return self.o((shares @ v).transpose(1, 2).flatten(2))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(table)
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        one_hot = ids.flatten()[:, None] == torch.arange(ctx.rows, device=ids.device)
        return one_hot.to(grad.dtype).T @ grad.flatten(0, -2), None


def compile_regions(module: nn.Module, kinds: Iterable[str], backend: str = "inductor") -> int:
    """Compile the regions of these kinds in place, with static shapes; returns how many.

    Raises:
        KeyError: a kind that `REGIONS` does not have.
    """
    classes = tuple(region for kind in kinds for region in REGIONS[kind])
    found = [child for child in module.modules() if isinstance(child, classes)]
    # Each shape of context, with and without its last block, compiles to its own graph; none may fall back silently.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for child in found:
        child.__dict__["forward"] = torch.compile(child.forward, dynamic=False, **with_barriers(backend))
    return len(found)


def graph_breaks() -> int:
    """The number of graph breaks within regions so far; for these regions it should be 0."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def save_compiled(folder: Path) -> int:
    """Write what torch.compile made in this process, in pieces small enough to carry; returns the bytes."""
    data = zlib.compress((torch.compiler.save_cache_artifacts() or (b"",))[0], 3)
    with replacing_folder(folder, over=True) as part:
        for i, first in enumerate(range(0, len(data), _PIECE)):
            (part / f"compiled.{i:02}").write_bytes(data[first : first + _PIECE])
    return len(data)


def load_compiled(folder: Path) -> int:
    """Load the compile cache that `save_compiled` wrote; torch uses only the entries that fit its version and GPU."""
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("compiled.*")))
    if data:
        torch.compiler.load_cache_artifacts(zlib.decompress(data))
    return len(data)


def initial_parts(architecture: Architecture, seed: int) -> Components:
    """All five models at their starting weights on the CPU, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = Components(
            MMDiT(architecture.transformer),
            VAE(architecture.vae),
            CLIPText(architecture.clip_l),
            CLIPText(architecture.clip_g),
            T5Encoder(architecture.t5),
            own_tokenizers(),
            shift=3.0,
        )
        with torch.no_grad():
            _start_transformer(parts.transformer)
            assert parts.clip_l and parts.clip_g and parts.t5
            _start_clip(parts.clip_l)
            _start_clip(parts.clip_g)
            _start_t5(parts.t5)
    return parts


def _start_transformer(model: MMDiT) -> None:
    """DiT (arXiv 2212.09748): Xavier linears, small embedders, and zeros where a block or the model adds its result."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(model.config.hidden_size, -1))
    nn.init.zeros_(model.x_embedder.proj.bias)  # type: ignore[arg-type]
    for name, module in model.named_modules():
        if name.startswith(("t_embedder", "y_embedder")) and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
            nn.init.zeros_(module.get_parameter("weight"))


def _start_clip(model: CLIPText) -> None:
    """OpenAI's widths of the linears; tokens and sinusoidal positions of equal strength.

    The context is the residual stream itself, without a norm: embeddings of std 0.02 would drown in what the first
    layers add, and sinusoids let a head find the word before from the first step, which is what binds colour to shape.
    """
    width, layers = model.config.width, model.config.layers
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = width**-0.5
            if name.endswith(("out_proj", "fc2")):
                std *= (2 * layers) ** -0.5
            nn.init.normal_(module.weight, std=std if not name.endswith("fc1") else (2 * width) ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings = model.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
    embeddings.position_embedding.weight.copy_(0.5 * math.sqrt(2) * _sinusoids(model.config.positions, width))


def _start_t5(model: T5Encoder) -> None:
    """The widths of T5 v1.1: its attention does not scale scores, so its queries start small."""
    config = model.config
    std = {
        "q": (config.width * config.head_dim) ** -0.5,
        "o": (config.heads * config.head_dim) ** -0.5,
        "wo": config.mlp_dim**-0.5,
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std.get(name.rpartition(".")[2], config.width**-0.5))
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if name == "shared" else 0.1)


def _sinusoids(positions: int, width: int) -> Tensor:
    """[sin | cos] of position times 2 pi / wavelengths from 4 to 300 tokens, [positions, width]."""
    wavelength = 4 * (300 / 4) ** torch.linspace(0, 1, width // 2)
    angle = torch.arange(positions)[:, None] * (2 * math.pi / wavelength)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
