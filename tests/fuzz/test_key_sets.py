"""Sets of tensor names and shapes: every file is described, or refused by our own error; none builds a large model."""

import re
import resource
import warnings

import pytest

import golden
from fuzzing import NUMBERS, cases, survives
from mmdit import CheckpointError
from mmdit.checkpoints.describe import inspect
from mmdit.checkpoints.recognise import split
from sparse import sparse as written

# Names and shapes of real files, at toy size: what is left of long dimensions is 64.
FILES = ("sd3.5_medium.safetensors", "clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
THEIRS = (
    "diffusers.sd3.5_medium.transformer",
    "diffusers.vae",
    "diffusers.text_encoder_2",
    "sd3.5_large_controlnet.safetensors",
)


def shapes(name: str, blocks: int = 3) -> dict[str, list[int]]:
    """The shapes of an official file, cut to a few blocks and to short sides."""
    found = {}
    for key, entry in golden.manifest(name)["tensors"].items():
        number = re.search(r"(?:blocks|layers|block)\.(\d+)\.", key)
        if "encoder.d" in key or "decoder.u" in key or number is None or int(number[1]) < blocks:
            found[key] = [side if side < 64 else 64 for side in entry["shape"]]
    return found


def sparse(path, sides: dict[str, list[int]], dtype: str = "F16", metadata=None):
    return written(path, {key: (dtype, shape) for key, shape in sides.items()}, metadata)


def changed(found: dict[str, list[int]], random) -> dict[str, list[int]]:
    """Names and shapes with one thing changed."""
    key = random.choice([*found])
    found = dict(found)
    match random.randrange(9):
        case 0:
            del found[key]
        case 1:
            found = {key: shape for key, shape in found.items() if random.random() < 0.5}
        case 2:
            found[re.sub(r"\d+", str(random.choice((0, 7, 999, 10**5, 10**12))), key, count=1)] = found[key]
        case 3:
            shape = [*found[key]] or [1]
            shape[random.randrange(len(shape))] = random.choice((0, 1, 3, 63, 2**20, 2**25))
            found[key] = shape
        case 4:
            found[key] = [*found[key], 1][random.randrange(2) :]
        case 5:
            wrap = random.choice(
                ("module.", "_orig_mod.", "transformer.", "model.", "model_ema.", "vae.", "\u202e", "a\n")
            )
            found = {wrap + key: shape for key, shape in found.items()}
        case 6:
            more = (
                "lora_up.weight",
                "scaled_fp8",
                f"{key}_scale",
                f"{key}.absmax",
                f"{key}.comfy_quant",
                "betas",
                "",
                ".",
            )
            found[random.choice(more)] = random.choice(([], [1], [64], [2]))
        case 7:
            found |= shapes(random.choice((*FILES, *THEIRS)), 1)
        case _:
            found[random.choice((*NUMBERS, "x" * 3000)).__str__()] = [1]
    return found


def describe(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        inspect(path)


def test_generated_key_sets(tmp_path):
    every = {name: shapes(name) for name in (*FILES, *THEIRS)}
    described = refused = 0
    for seed, random in cases(12):
        found = every[random.choice([*every])]
        for _ in range(random.choice((0, 1, 1, 2, 3))):
            found = changed(found, random) if found else found
        dtype = random.choice(("F16", "F16", "F8_E4M3", "I8", "U8"))
        path = sparse(tmp_path / random.choice(("clip_l.safetensors", "m.safetensors")), found, dtype)
        succeeded = survives(lambda path=path: describe(path), (CheckpointError,), seed)
        described, refused = described + succeeded, refused + (not succeeded)
        path.unlink()
    assert described
    assert refused


T5_BLOCK = "encoder.block.{}.layer.0.SelfAttention.q.weight"
T5 = {"shared.weight": [64, 64], "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": [32, 1]}
T5 |= {"encoder.block.0.layer.1.DenseReluDense.wo.weight": [64, 64]}
MEDIUM = "model.diffusion_model."
# Every input that ever failed: with which error of Python's, after how long, or with how much memory.
REGRESSIONS = {
    "T5 of 1,500 blocks with one tensor each (20,000: 18 s, 3 GB)": T5
    | {T5_BLOCK.format(i): [64, 64] for i in range(1_500)},
    "T5 with one far block": T5 | {T5_BLOCK.format(i): [64, 64] for i in (0, 1_499)},
    "MMDiT with one far block (1000 blocks)": shapes(FILES[0])
    | {f"{MEDIUM}joint_blocks.999.x_block.attn.qkv.weight": [1]},
    "MMDiT of 1,500 blocks with one tensor each": {
        f"{MEDIUM}joint_blocks.{i}.x_block.attn2.ln_q.weight": [64] for i in range(1_500)
    }
    | shapes(FILES[0]),
    "diffusers of 1,500 blocks with one tensor each": {
        f"transformer_blocks.{i}.attn.add_q_proj.weight": [1] for i in range(1_500)
    },
    "VAE of 1,500 levels": {
        f"first_stage_model.encoder.down.{i}.block.0.conv1.weight": [32, 32, 1, 1] for i in range(1_500)
    }
    | {"first_stage_model.decoder.conv_in.weight": [32, 16, 3, 3]},
    "width that overflows (RuntimeError)": shapes(FILES[0]) | {f"{MEDIUM}x_embedder.proj.weight": [2**25, 1, 1, 1]},
    "CLIP with a huge table": shapes(FILES[1]) | {"text_model.embeddings.token_embedding.weight": [2**33, 1]},
    "names that end a line": {"a\nb": [1], "\x1b[2J": [1]},
}


@pytest.mark.parametrize("case", REGRESSIONS)
def test_inputs_that_once_failed(tmp_path, case):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = sparse(tmp_path / "clip_l.safetensors", REGRESSIONS[case])
    problems: list[str] = []
    succeeded = survives(lambda: problems.extend(inspect(path).problems), (CheckpointError,), case)
    assert bool(problems) is succeeded is ("names" not in case)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "KB"


def test_no_control_characters_in_messages(tmp_path):
    path = sparse(tmp_path / "f.safetensors", {"a\nb\x1b[2J": [1]})
    with pytest.raises(CheckpointError) as error:
        inspect(path)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_splitting_is_linear():
    keys = [f"model.diffusion_model.joint_blocks.{i}.x_block.attn.qkv.weight" for i in range(50_000)]
    assert survives(lambda: split(keys), (), "50,000 names")
