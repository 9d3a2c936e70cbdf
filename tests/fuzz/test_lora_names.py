"""Names, shapes and header metadata of LoRA files: every input is read, or refused by our own error, and soon."""

from functools import partial
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fuzzing import VALUES, cases, survives
from mmdit import CheckpointError, load_lora
from refusals import refuses

FOLDER = Path(__file__).parents[1] / "data" / "lora"
FILES = sorted(path for path in FOLDER.glob("*.safetensors") if path.stem != "golden")
WORDS = (
    *("lora_A", "lora_B", "lora_down", "lora_up", "lora_mid", "alpha", "dora_scale", "diff", "diff_b", "hada_w1_a"),
    *("lokr_w1", "oft_blocks", "a1", "b2", "set_weight", "reshape_weight", "lora_te1", "lora_unet", "transformer"),
    *("text_encoder_3", "joint_blocks", "999999999", "-1", "", "weight", "\u202e", "x" * 3000),
)
NUMBERS = (0.0, -1.0, 1e30, float("nan"), float("inf"))


def renamed(key: str, random: Random) -> str:
    """The key with a part exchanged, left out or doubled."""
    parts = key.split(".")
    place = random.randrange(len(parts))
    parts[place : place + random.randrange(2)] = [random.choice(WORDS)] * random.randrange(3)
    return ".".join(parts)


def reshaped(tensor: Tensor, random: Random) -> Tensor:
    """Another tensor: cut, of more or fewer axes, of another dtype, or with a value that is no number."""
    match random.randrange(6):
        case 0:
            return tensor[: random.randrange(len(tensor) + 1)] if tensor.ndim else tensor
        case 1:
            return tensor.unsqueeze(random.randrange(tensor.ndim + 1))
        case 2:
            return tensor.flatten()
        case 3:
            return tensor.to(random.choice((torch.int64, torch.bool, torch.float16, torch.complex64)))
        case 4:
            return torch.full(tensor.shape, random.choice(NUMBERS))
        case _:
            return torch.zeros(random.choice(((), (0,), (3,), (1, 2, 3, 4, 5), (0, 4))))


def load_and_show(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    return repr(load_lora(tensors, metadata=metadata))


def test_changed_files():
    whole = {path: load_file(path) for path in FILES}
    headers = {path: safe_open(path, "pt").metadata() or {} for path in FILES}
    read = refused = 0
    for seed, random in cases(60):
        path = random.choice(FILES)
        tensors, metadata = dict(whole[path]), dict(headers[path])
        for _ in range(random.choice((1, 1, 2, 6))):
            key = random.choice([*tensors])
            match random.randrange(4):
                case 0:
                    del tensors[key]
                case 1:
                    tensors[renamed(key, random)] = tensors.pop(key)
                case 2:
                    tensors[key] = reshaped(tensors[key], random)
                case _:
                    metadata[random.choice(("lora_adapter_metadata", "ss_network_args", "format"))] = str(
                        random.choice(VALUES)
                    )
        succeeded = survives(partial(load_and_show, tensors, metadata), (CheckpointError,), seed)
        read, refused = read + succeeded, refused + (not succeeded)
    assert refused
    assert read, "a generator that breaks everything tries little"


def test_complex_numbers_are_refused():
    tensors = load_file(FOLDER / "kohya_l.safetensors")
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    refuses(lambda: load_lora(tensors | {key: tensors[key].to(torch.complex64)}), key, "complex64")
