"""LoRA files of every program and kind, written here, with the weights that they should give in float64.

The formulas are written again from the papers, apart from those of the library.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdit import MMDiT, MMDiTConfig

WIDTH, RANK = 64, 4
Factors = dict[str, Tensor]  # by suffix; "up" and "down" have a suffix that the naming says
After = Callable[[Tensor, float], Tensor]  # the weight (in the file's order of rows) and the strength -> the new weight
SHAPES = {
    "joint_blocks.0.x_block.attn.qkv": (3 * WIDTH, WIDTH),
    "joint_blocks.0.x_block.mlp.fc2": (WIDTH, 4 * WIDTH),
    "joint_blocks.1.context_block.adaLN_modulation.1": (2 * WIDTH, WIDTH),
}


@dataclass(frozen=True)
class Module:
    """A module in a style of names: the official module that it means, its third of rows, its order of halves."""

    name: str
    official: str
    third: int | None = None
    exchanged: bool = False


OFFICIAL = tuple(Module(name, name) for name in SHAPES)
DIFFUSERS = (
    Module("transformer_blocks.0.attn.to_k", "joint_blocks.0.x_block.attn.qkv", 1),
    Module("transformer_blocks.0.ff.net.2", "joint_blocks.0.x_block.mlp.fc2"),
    Module("transformer_blocks.1.norm1_context.linear", "joint_blocks.1.context_block.adaLN_modulation.1", None, True),
)
OMI = (Module("joint_blocks.0.x_block.attn.qkv.1", "joint_blocks.0.x_block.attn.qkv", 1), *OFFICIAL[1:])


@dataclass(frozen=True)
class Naming:
    """How a program names modules and the two factors of a LoRA."""

    modules: tuple[Module, ...]
    prefix: str
    up: str = ".lora_up.weight"
    down: str = ".lora_down.weight"
    flat: bool = False

    def key(self, module: Module, suffix: str) -> str:
        name = module.name.replace(".", "_") if self.flat else module.name
        return self.prefix + name + {"up": self.up, "down": self.down}.get(suffix, suffix)


AB = {"up": ".lora_B.weight", "down": ".lora_A.weight"}
NAMINGS = {
    "diffusers, SimpleTuner": Naming(DIFFUSERS, "transformer.", **AB),
    "peft": Naming(DIFFUSERS, "base_model.model.", **AB),
    "peft, adapter's name left in": Naming(
        DIFFUSERS, "transformer.", ".lora_B.default.weight", ".lora_A.default.weight"
    ),
    "old diffusers": Naming(DIFFUSERS, "transformer.", "_lora.up.weight", "_lora.down.weight"),
    "old diffusers, layers": Naming(
        DIFFUSERS, "transformer.", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"
    ),
    "diffusers without prefix": Naming(DIFFUSERS, "", **AB),
    "kohya sd-scripts, OneTrainer": Naming(OFFICIAL, "lora_unet_", flat=True),
    "OneTrainer, legacy": Naming(DIFFUSERS, "lora_transformer_", flat=True),
    "OneTrainer, ComfyUI's": Naming(OFFICIAL, "diffusion_model.", **AB),
    "OneTrainer, original": Naming(OFFICIAL, "", **AB),
    "OneTrainer, OMI": Naming(OMI, "transformer."),
    "LyCORIS": Naming(DIFFUSERS, "lycoris_", flat=True),
    "ComfyUI": Naming(OFFICIAL, "diffusion_model."),
    "single file's prefix": Naming(OFFICIAL, "model.diffusion_model."),
}


def noise(seed: int, *shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model() -> MMDiT:
    """A random transformer whose last block is the second."""
    made = MMDiT(MMDiTConfig(depth=2, hidden_size=WIDTH, context_dim=32, pooled_dim=16, pos_embed_size=8))
    state = {key: noise(place, *tensor.shape).float() for place, (key, tensor) in enumerate(made.state_dict().items())}
    made.load_state_dict(state)
    return made.eval().requires_grad_(False)


def alpha(value: float) -> Factors:
    return {".alpha": torch.tensor(value)}


def lora(rows: int, columns: int) -> tuple[Factors, After]:
    up, down = noise(1, rows, RANK), noise(2, RANK, columns)
    return {"up": up, "down": down} | alpha(2.0), lambda weight, s: weight + s * 0.5 * up @ down


def dora_rows(rows: int, columns: int) -> tuple[Factors, After]:
    factors, after = lora(rows, columns)
    norms = 1 + noise(3, rows, 1)

    def changed(weight: Tensor, s: float) -> Tensor:
        moved = after(weight, 1.0)
        return (1 - s) * weight + s * torch.nn.functional.normalize(moved, dim=1) * norms

    return factors | {".dora_scale": norms}, changed


def dora_columns(rows: int, columns: int) -> tuple[Factors, After]:
    factors, after = lora(rows, columns)
    norms = 1 + noise(3, 1, columns)

    def changed(weight: Tensor, s: float) -> Tensor:
        moved = after(weight, 1.0)
        return (1 - s) * weight + s * torch.nn.functional.normalize(moved, dim=0) * norms

    return factors | {".dora_scale": norms}, changed


def dora_peft(rows: int, columns: int) -> tuple[Factors, After]:
    up, down, norms = noise(1, rows, RANK), noise(2, RANK, columns), 1 + noise(3, rows)
    return {
        "up": up,
        "down": down,
        ".lora_magnitude_vector": norms,
    }, lambda weight, s: norms[:, None] * (torch.nn.functional.normalize(weight + s * up @ down, dim=1))


def loha(rows: int, columns: int) -> tuple[Factors, After]:
    a1, b1, a2, b2 = noise(1, rows, RANK), noise(2, RANK, columns), noise(3, rows, RANK), noise(4, RANK, columns)
    factors = {".hada_w1_a": a1, ".hada_w1_b": b1, ".hada_w2_a": a2, ".hada_w2_b": b2} | alpha(1.0)
    terms = torch.einsum("or,rc,oq,qc->oc", a1, b1, a2, b2)
    return factors, lambda weight, s: weight + s * 0.25 * terms


def lokr(rows: int, columns: int) -> tuple[Factors, After]:
    one, a, b = noise(1, 8, 8), noise(2, rows // 8, RANK), noise(3, RANK, columns // 8)
    blocks = torch.einsum("ac,br,rd->abcd", one, a, b).reshape(rows, columns)
    return {".lokr_w1": one, ".lokr_w2_a": a, ".lokr_w2_b": b} | alpha(
        1.0
    ), lambda weight, s: weight + s * 0.25 * blocks


def lokr_whole(rows: int, columns: int) -> tuple[Factors, After]:
    """Where neither is factored alpha does not count."""
    one, two = noise(1, 4, 4), noise(2, rows // 4, columns // 4)
    blocks = torch.einsum("ac,bd->abcd", one, two).reshape(rows, columns)
    return {".lokr_w1": one, ".lokr_w2": two} | alpha(64.0), lambda weight, s: weight + s * blocks


def glora(rows: int, columns: int) -> tuple[Factors, After]:
    a1, a2, b1, b2 = noise(1, columns, RANK), noise(2, RANK, columns), noise(3, rows, RANK), noise(4, RANK, columns)
    factors = {".a1.weight": a1, ".a2.weight": a2, ".b1.weight": b1, ".b2.weight": b2} | alpha(2.0)
    return factors, lambda weight, s: weight + s * 0.5 * (weight @ (a1 @ a2) + b1 @ b2)


def oft(rows: int, columns: int) -> tuple[Factors, After]:
    blocks = noise(1, rows // 16, 16, 16)
    eye = torch.eye(16, dtype=torch.float64)

    def changed(weight: Tensor, s: float) -> Tensor:
        turned = []
        for block, part in zip(blocks, weight.split(16), strict=True):
            q = block - block.T
            turned.append((((eye + q) @ torch.linalg.inv(eye - q)).T @ part) * s + (1 - s) * part)
        return torch.cat(turned)

    return {".oft_blocks": blocks} | alpha(0.0), changed


def ia3(rows: int, columns: int) -> tuple[Factors, After]:
    factor = noise(1, rows)
    return {".weight": factor, ".on_input": torch.tensor(0)}, lambda weight, s: weight * (1 + s * factor[:, None])


def ia3_inputs(rows: int, columns: int) -> tuple[Factors, After]:
    factor = noise(1, columns)
    return {".weight": factor, ".on_input": torch.tensor(1)}, lambda weight, s: weight * (1 + s * factor)


def full(rows: int, columns: int) -> tuple[Factors, After]:
    diff = noise(1, rows, columns)
    return {".diff": diff}, lambda weight, s: weight + s * diff


def replaced(rows: int, columns: int) -> tuple[Factors, After]:
    value = noise(1, rows, columns)
    return {".set_weight": value}, lambda weight, s: value


KINDS = {
    "LoRA": lora,
    "DoRA, rows": dora_rows,
    "DoRA, inputs": dora_columns,
    "DoRA of peft": dora_peft,
    "LoHa": loha,
    "LoKr": lokr,
    "LoKr, whole": lokr_whole,
    "GLoRA": glora,
    "OFT": oft,
    "(IA)³, rows": ia3,
    "(IA)³, inputs": ia3_inputs,
    "full": full,
    "replacement": replaced,
}


def written(naming: str, kind: str) -> tuple[dict[str, Tensor], list[tuple[Module, After]]]:
    """The tensors of a file in float32, and what each of its modules should do."""
    tensors, afters = {}, []
    for module in NAMINGS[naming].modules:
        rows, columns = SHAPES[module.official]
        factors, after = KINDS[kind](rows if module.third is None else rows // 3, columns)
        rounded = {
            suffix: tensor.float() if tensor.is_floating_point() else tensor for suffix, tensor in factors.items()
        }
        tensors |= {NAMINGS[naming].key(module, suffix): tensor for suffix, tensor in rounded.items()}
        afters.append((module, after))
    return tensors, afters


def expected(state: dict[str, Tensor], afters: list[tuple[Module, After]], strength: float) -> dict[str, Tensor]:
    """The weights after a file, in float64, by official key."""
    found = {}
    for module, after in afters:
        weight = found.get(f"{module.official}.weight", state[f"{module.official}.weight"].double()).clone()
        size = len(weight) // 3
        rows = slice(None) if module.third is None else slice(module.third * size, (module.third + 1) * size)
        part = weight[rows]
        part = part.roll(len(part) // 2, 0) if module.exchanged else part
        part = after(part, strength)
        weight[rows] = part.roll(len(part) // 2, 0) if module.exchanged else part
        found[f"{module.official}.weight"] = weight
    return found
