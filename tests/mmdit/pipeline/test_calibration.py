"""Calibration and static quantization of the transformer; every fold of the model computes the same."""

import copy
from dataclasses import replace

import pytest
import torch

import mmdit
from mmdit import MMDiT, MMDiTConfig, Pipeline
from mmdit.pipeline.calibration import Calibration, calibrate, fold, folds_of, quantize_calibrated, quantize_static
from quant.folds import smoothing
from quant.observers import Observed, observe
from quant.quantize import kept, linears_of, quantize_
from quant.recipe import Recipe
from quant.tensor import Float8Tensor

PROMPTS = ["a red circle", "a small star, left of two rings", "a blue square"]
SMALL = {"num_inference_steps": 1, "height": 32, "width": 32}
FOLDS = [{"smooth": 0.5}, {"mean": True}, {"smooth": 0.7, "mean": True}]
CONFIG = MMDiTConfig(
    depth=3, hidden_size=16, context_dim=8, pooled_dim=8, pos_embed_size=4, head_dim=8, dual_attention_blocks=(0, 2)
)


def load(tiny_folders, variant, dtype=torch.float32) -> Pipeline:
    return Pipeline.from_pretrained(tiny_folders[variant], dtype=dtype)


def draw(pipe: Pipeline) -> torch.Tensor:
    return pipe(PROMPTS[0], seed=5, output_type="latent", **SMALL).images


def error(found, wanted) -> float:
    return float((found - wanted).norm() / wanted.norm())


def copied(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def folded_readers(config: MMDiTConfig) -> list[str]:
    """All Linears of the blocks but fc2, which reads a GELU, and adaLN."""
    found = []
    for i in range(config.depth):
        for stream in ("context_block", "x_block"):
            last = stream == "context_block" and i == config.depth - 1
            found += [
                f"joint_blocks.{i}.{stream}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1")[: 3 - 2 * last]
            ]
        if i in config.dual_attention_blocks:
            found += [f"joint_blocks.{i}.x_block.{name}" for name in ("attn2.qkv", "attn2.proj")]
    return found


@pytest.fixture
def small() -> MMDiT:
    return MMDiT(CONFIG).double()


def imagined(model: MMDiT) -> tuple[Calibration, dict[str, torch.Tensor]]:
    """A calibration, and the rows of each Linear: of other number, range and mean in each."""
    chosen = [(name, linear.in_features) for name, linear in linears_of(model) if kept(name) is None]
    rows = {
        name: torch.randn(4 + 9 * (i % 5), width) * (0.1 + torch.rand(width)) + torch.randn(width)
        for i, (name, width) in enumerate(chosen)
    }
    observed = {name: Observed(width, torch.device("cpu")) for name, width in chosen}
    for name, seen in observed.items():
        seen.add(rows[name])
    return Calibration(observed, ("none",), 1), rows


def test_calibration_counts_every_token_of_both_branches(tiny_folders):
    pipe = load(tiny_folders, "sd3.5-medium")
    wanted = draw(pipe)
    seen = calibrate(pipe, PROMPTS, 2, height=32, width=32, batch=2)
    chosen = [name for name, _ in linears_of(pipe.transformer) if "block" in name and "adaLN" not in name]
    assert list(seen.observed) == chosen
    tokens = 2 * 2 * len(PROMPTS)  # steps, branches, pictures
    assert seen.observed["joint_blocks.0.x_block.attn.qkv"].rows == tokens * 4
    assert seen.observed["joint_blocks.0.context_block.attn.qkv"].rows == tokens * 333
    assert torch.equal(draw(pipe), wanted)
    assert (seen.prompts, seen.steps) == (tuple(PROMPTS), 2)


def test_batches_read_what_pictures_of_their_own_seeds_read():
    pipe = Pipeline.demo()
    found = calibrate(pipe, PROMPTS, **SMALL, seed=7, batch=2).observed
    with observe(pipe.transformer) as wanted:
        for i, prompt in enumerate(PROMPTS):
            pipe(prompt, seed=7 + i, output_type="latent", **SMALL)
    for name, one in wanted.items():
        assert found[name].rows == one.rows
        for statistic in ("channel_amax", "mean", "rms"):
            torch.testing.assert_close(
                getattr(found[name], statistic),
                getattr(one, statistic),
                rtol=1e-4,
                atol=1e-4,
                msg=f"{name} {statistic}",
            )


def test_what_is_quantized_is_neither_calibrated_nor_folded(small):
    pipe, (seen, _) = Pipeline.demo(), imagined(small)
    quantize_(pipe.transformer)
    with pytest.raises(ValueError, match="quantized already"):
        calibrate(pipe, PROMPTS, 1)
    quantize_(small)
    with pytest.raises(ValueError, match=r"quantized already \(\d+ weights: .*\)"):
        fold(small, seen, smooth=0.5)


def test_what_is_compiled_is_not_calibrated():
    pipe = Pipeline.demo()
    pipe.transformer.joint_blocks[1].compile(backend="eager")
    for call in (calibrate, quantize_static):
        with pytest.raises(ValueError, match=r"joint_blocks.1 is compiled \(torch.compile\)"):
            call(pipe, PROMPTS, **SMALL)
    assert not any(isinstance(weight, Float8Tensor) for weight in pipe.transformer.parameters())


def test_linears_that_read_nothing_are_named(small):
    seen, _ = imagined(small)
    idle = list(seen.observed)[2:6]
    for name in idle:
        seen.observed[name] = Observed(16, torch.device("cpu"))
    before = copied(small)
    for call in (
        seen.amax,
        lambda: fold(small, seen, mean=True),
        lambda: quantize_calibrated(small, seen),
    ):
        with pytest.raises(ValueError, match=f"4 of {len(seen.observed)} Linears read nothing") as caught:
            call()
        assert f": {', '.join(idle[:3])}, and 1 more. Calibrate again" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_folds_reach_every_reader_of_the_blocks_once(small):
    reached = [name for place in folds_of(small) for name in place.consumers]
    assert sorted(reached) == sorted(folded_readers(CONFIG))


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, qk_norm=None, dual_attention_blocks=())], ids=["dual", "plain"]
)
@pytest.mark.parametrize("options", FOLDS, ids=str)
def test_folds_change_weights_and_not_the_output(config, options):
    model = MMDiT(config).double()
    sizes = ((2, 16, 8, 4), (2,), (2, 5, 8), (2, 8))  # latent, timestep, context, pooled
    inputs = [torch.randn(size, dtype=torch.float64) for size in sizes]
    wanted, before = model(*inputs), copied(model)
    assert fold(model, imagined(model)[0], **options) == len(list(folds_of(model)))
    torch.testing.assert_close(model(*inputs), wanted, rtol=0, atol=1e-10)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert all(f"{name}.bias" in changed or f"{name}.weight" in changed for name in folded_readers(config))


def test_folds_of_what_was_calibrated_draw_the_same_picture_of_smaller_means(tiny_folders):
    pipe = load(tiny_folders, "sd3.5-medium", torch.float64)
    wanted, seen = draw(pipe), calibrate(pipe, PROMPTS[:1], **SMALL)
    fold(pipe.transformer, seen, smooth=0.7, mean=True)
    torch.testing.assert_close(draw(pipe), wanted, rtol=0, atol=2e-6)  # the latent between steps is float32
    after = calibrate(pipe, PROMPTS[:1], **SMALL)
    for place in folds_of(pipe.transformer):
        readers = [after.observed[name] for name in place.consumers]
        mean = sum(one.mean * one.rows for one in readers) / sum(one.rows for one in readers)
        assert float(mean.abs().max()) < 1e-5, place.consumers


@pytest.mark.parametrize("options", FOLDS, ids=str)
def test_folds_are_of_the_rows_of_all_readers_together(small, options):
    (seen, rows), before = imagined(small), copied(small)
    fold(small, seen, **options)
    after = small.state_dict()
    for place in folds_of(small):
        together = torch.cat([rows[name] for name in place.consumers]).double()
        mean, amax = together.mean(0), together.abs().amax(0)
        weights = [before[f"{name}.weight"] for name in place.consumers]
        left = (amax - mean.abs()).clamp(min=0) if "mean" in options else amax
        factors = smoothing(left, weights, options["smooth"]).double() if "smooth" in options else torch.ones(16)
        for name, weight in zip(place.consumers, weights, strict=True):
            # The first rows of a consumer make nothing that a fold changes: of qkv they are q.
            found = after[f"{name}.weight"][:16] / weight[:16]
            torch.testing.assert_close(found, factors.double().expand(16, 16), rtol=1e-5, atol=0)  # float32 statistics
            moved = (weight @ mean)[:16] if "mean" in options else torch.zeros(16).double()
            change = (after[f"{name}.bias"] - before[f"{name}.bias"])[:16]
            torch.testing.assert_close(change, moved, rtol=1e-5, atol=1e-6)


def by_hand(pipe: Pipeline, *, smooth=None, mean=False, bias=False, percentile=100.0) -> None:
    model, seen = pipe.transformer, calibrate(pipe, PROMPTS[:2], **SMALL)
    if smooth or mean:
        fold(model, seen, smooth=smooth, mean=mean)
        seen = calibrate(pipe, PROMPTS[:2], **SMALL)
    before = copied(model)
    scales = {name: one.percentile(percentile) / 448 for name, one in seen.observed.items()}
    quantize_(model, "fp8-static", input_scales=scales)
    for name, one in seen.observed.items() if bias else ():
        linear = model.get_submodule(name)
        drift = (linear.weight.dequantize().double() - before[f"{name}.weight"].double()) @ one.mean.double()
        linear.bias.data = (linear.bias.double() - drift).float()


@pytest.mark.parametrize(
    "options",
    [{}, {"smooth": 0.5}, {"mean": True}, {"bias": True}, {"percentile": 99.0}, {"smooth": 0.3, "bias": True}],
    ids=str,
)
def test_options_do_what_their_names_say_and_no_more(tiny_folders, options):
    pipe = load(tiny_folders, "sd3.5-medium")
    original, wanted, mine = copied(pipe.transformer), draw(pipe), copy.deepcopy(pipe)
    report = quantize_static(pipe, PROMPTS[:2], **SMALL, **options)
    by_hand(mine, **options)
    for layer in report:
        found, expected = (one.transformer.get_submodule(layer.name) for one in (pipe, mine))
        assert torch.equal(found.bias, expected.bias), layer.name
        assert (layer.recipe is not None) == ("block" in layer.name and "adaLN" not in layer.name)
        if layer.recipe is not None:
            assert found.weight.recipe.activation == "static"
            assert torch.equal(found.weight.input_scale, expected.weight.input_scale), layer.name
            assert torch.equal(found.weight.dequantize(), expected.weight.dequantize()), layer.name
    changed = any(
        not torch.equal(pipe.transformer.state_dict()[key], original[key]) for key in original if "bias" in key
    )
    assert changed == bool({"smooth", "mean", "bias"} & set(options))
    assert 1e-5 < error(draw(pipe), wanted) < 0.1  # 28.5 dB a layer are 4 %


@pytest.mark.parametrize(("format", "largest"), [("e4m3", 448), ("e5m2", 57344)])
def test_scales_are_for_the_format_of_the_activations(small, format, largest):
    seen, rows = imagined(small)
    recipe = Recipe(granularity="tensor", activation="static", activation_format=format)
    quantize_calibrated(small.float(), seen, recipe)
    for name, read in rows.items():
        scale = small.get_submodule(name).weight.input_scale
        assert float(scale) == pytest.approx(float(read.abs().max()) / largest, rel=1e-6)


def test_recipes_that_take_no_calibration(small):
    pipe, (seen, _) = Pipeline.demo(), imagined(small)
    for recipe, said in (
        ("fp8", "activation='token'"),
        ("fp8-statics", "unknown recipe"),
    ):
        with pytest.raises(ValueError, match=said):
            quantize_calibrated(small, seen, recipe)
        with pytest.raises(ValueError, match=said):
            quantize_static(pipe, PROMPTS, **SMALL, recipe=recipe)


def test_a_wrong_percentile_is_refused_before_anything_is_folded():
    pipe = Pipeline.demo()
    before = copied(pipe.transformer)
    with pytest.raises(ValueError, match="a percentile is above 0 and at most 100, got 0"):
        quantize_static(pipe, PROMPTS[0], **SMALL, smooth=0.5, percentile=0.0)
    assert all(torch.equal(value, before[key]) for key, value in pipe.transformer.state_dict().items())


def test_folds_and_loras_exclude_each_other():
    """A LoRA beside or in folded weights reads other inputs than it was trained on."""
    pipe = Pipeline.demo()
    pipe.load_lora_weights(mmdit.OUTLINES, "outlines")
    for form in ("attached", "merged"):
        with pytest.raises(ValueError, match=r"LoRAs.*save_pretrained"):
            quantize_static(pipe, PROMPTS[0], **SMALL, mean=True)
        pipe.fuse_lora() if form == "attached" else pipe.unload_lora_weights()
    pipe.load_lora_weights(mmdit.OUTLINES, "outlines")
    with pytest.raises(ValueError, match="LoRAs or adapters are beside 16"):
        fold(pipe.transformer, Calibration({}, (), 1), smooth=0.5)
    pipe.unload_lora_weights()
    seen = calibrate(pipe, PROMPTS[0], **SMALL)
    fold(pipe.transformer, seen)
    assert not pipe.transformer.folded
    fold(pipe.transformer, seen, mean=True)
    for change in (
        lambda: pipe.load_lora_weights(mmdit.OUTLINES, "outlines"),
        lambda: mmdit.merge_lora(pipe.transformer, mmdit.load_lora(mmdit.OUTLINES)),
    ):
        with pytest.raises(ValueError, match="folded"):
            change()
    assert not pipe.get_active_adapters()
