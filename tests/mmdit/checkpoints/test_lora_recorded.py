"""Merged LoRAs against the numbers that ComfyUI, diffusers and peft gave for the same files."""

import pytest
import torch
from torch import Tensor

import lora_cases as recorded
from mmdit import MMDiT, MMDiTConfig, merge_lora
from quant import Float8Tensor, Recipe

LIMIT = 1e-5
PLAIN = [(case, run) for case, run in recorded.RUNS if not case["name"].startswith("fp8")]
FLOAT8 = [(case, run) for case, run in recorded.RUNS if case["name"].startswith("fp8")]


def named(pairs: list[tuple[dict, dict]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("case", "run"), pairs, ids=[f"{case['name']}-{run['id']}" for case, run in pairs])


def test_all_cases_are_here() -> None:
    assert (len(recorded.CASES["cases"]), len(recorded.RUNS)) == (18, 45)


@named(PLAIN)
def test_changes_and_touched_keys(case: dict, run: dict) -> None:
    loras, touched = recorded.loras_of(case, run), {}
    for part, before in recorded.models_of(case).items():
        if not any(lora.of(part) for lora in loras):
            continue
        after = merge_lora(before, loras, recorded.strengths(run, part), part=part)
        assert after.keys() == before.keys()
        prefix = "" if part == "transformer" else f"{part}/"
        touched |= {prefix + key: after[key] - before[key] for key in before if after[key] is not before[key]}
    assert sorted(touched) == run["touched"]
    name = f"{case['name']}|{run['id']}"
    assert 0 < max(recorded.error(name, key, change) for key, change in touched.items()) < LIMIT


@named([(case, run) for case, run in PLAIN if run.get("unused") is not None])
def test_unused_keys(case: dict, run: dict) -> None:
    unused = {key for lora in recorded.loras_of(case, run) for key in lora.unused}
    if not case["text_encoders"]:  # recorded without them, so that their keys were left
        unused |= {key for one in run["stack"] for key in recorded.tensors(one["file"]) if key.startswith("lora_te")}
    assert sorted(unused) == sorted(run["unused"])


@pytest.mark.parametrize("name", sorted(name for name in recorded.golden() if name.split("|")[-1] == "out"))
def test_velocity_of_the_patched_model(name: str) -> None:
    case, run = next((case, run) for case, run in PLAIN if name.split("|")[:2] == [case["name"], run["id"]])
    state = merge_lora(
        recorded.bare(case["model"]),
        recorded.loras_of(case, run),
        recorded.strengths(run, "transformer"),
        part="transformer",
    )
    config = MMDiTConfig.from_shapes({key: tuple(tensor.shape) for key, tensor in state.items()})
    model = MMDiT(config)
    model.load_state_dict(state)
    shapes = {"x": (1, 16, 8, 8), "context": (1, 7, config.context_dim), "pooled": (1, config.pooled_dim)}
    x, context, pooled = (recorded.formula_input(case["model"], key, shape) for key, shape in shapes.items())
    with torch.no_grad():
        found = model(x, torch.tensor([500.0]), context, pooled)
    wanted = recorded.golden()[name].reshape(found.shape)
    assert (found - wanted).norm() / wanted.norm() < LIMIT


def float8_base(case: dict) -> dict[str, Tensor]:
    """The recorded model in float8, as `cases.json` says."""
    weights = recorded.base(case["model"])
    if case["name"] == "fp8_scaled":
        recipe = Recipe("e4m3", "tensor", activation="none")
        return {
            key: Float8Tensor.quantize(tensor, recipe=recipe) if tensor.ndim == 2 else tensor
            for key, tensor in weights.items()
        }
    dtype = torch.float8_e5m2 if case["name"].endswith("e5m2") else torch.float8_e4m3fn
    largest = torch.finfo(dtype).max
    return {key: tensor.clamp(-largest, largest).to(dtype) for key, tensor in weights.items()}


@pytest.mark.usefixtures("rounded_draws")
@named(FLOAT8)
def test_float8_codes_are_comfyuis(case: dict, run: dict) -> None:
    before = float8_base(case)
    after = merge_lora(before, recorded.loras_of(case, run), recorded.strengths(run, "transformer"), part="transformer")
    assert sorted(key for key in before if after[key] is not before[key]) == run["touched"]
    compared = 0
    for key in run["touched"]:
        codes = recorded.golden().get(f"{case['name']}|{run['id']}|{key}|codes")
        if codes is None:
            continue
        found = after[key].qdata if isinstance(after[key], Float8Tensor) else after[key]
        torch.testing.assert_close(found.view(torch.uint8), codes.reshape(found.shape), rtol=0, atol=0)
        compared += 1
    assert compared


@named(FLOAT8[:1] + FLOAT8[-2:-1])
def test_float8_is_rounded_to_nearest_by_default(case: dict, run: dict) -> None:
    before = float8_base(case)
    trained = recorded.lora(run["stack"][0]["file"])
    wanted = merge_lora({key: value_of(tensor) for key, tensor in before.items()}, trained, part="transformer")
    after = merge_lora(before, trained, part="transformer")
    for key in run["touched"]:
        if isinstance(before[key], Float8Tensor):
            expected = Float8Tensor.quantize(wanted[key], recipe=before[key].recipe)
            assert torch.equal(after[key].scale, expected.scale)
        else:
            expected = wanted[key].to(before[key].dtype)
        assert torch.equal(value_of(after[key]), value_of(expected)), key


def value_of(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, Float8Tensor) else tensor.float()
