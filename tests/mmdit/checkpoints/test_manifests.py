"""Every key of every official file is taken and none is left, at full size, on the meta device."""

import pytest
import torch

import golden
from mmdit.checkpoints.components import REGISTRY, to_diffusers
from mmdit.checkpoints.config_json import CONSTANT, SETTLED, TAKEN
from mmdit.checkpoints.keymaps import Concat, SwapHalves, count, mmdit_rules, to_ours, to_theirs, vae_rules
from mmdit.checkpoints.lazy import LazyTensor
from mmdit.checkpoints.official import variant
from mmdit.checkpoints.recognise import split

SINGLE_FILES = {
    "sd3_medium": ("SD3-Medium", 491),
    "sd3.5_medium": ("SD3.5-Medium", 665),
    "sd3.5_large": ("SD3.5-Large or Large-Turbo (same shapes)", 923),
}


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(entry["shape"]) for key, entry in golden.manifest(name)["tensors"].items()}


def lazy(found: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    return {key: LazyTensor.of(torch.empty(shape, device="meta", dtype=torch.float16)) for key, shape in found.items()}


def keys_of_our_model(component: str, found: dict[str, tuple[int, ...]], said=None) -> dict[str, tuple[int, ...]]:
    """The shapes that the model inferred from these shapes has."""
    config = REGISTRY[component].config_of(found, said or {})
    with torch.device("meta"):
        model = REGISTRY[component].module(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_single_files(name):
    stored = shapes(f"{name}.safetensors")
    models = split(stored).models
    assert (split(stored).left, split(stored).dropped) == ([], {})
    assert set(models) == {"transformer", "vae"}
    for component, model in models.items():
        found = {own: stored[key] for own, key in model.keys.items()}
        assert keys_of_our_model(component, found) == found
    transformer = {own: stored[key] for own, key in models["transformer"].keys.items()}
    config = REGISTRY["transformer"].config_of(transformer, {})
    assert (variant(config)[0], len(models["transformer"].keys)) == SINGLE_FILES[name]
    assert config.dual_attention_blocks == (tuple(range(13)) if name == "sd3.5_medium" else ())


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_diffusers_transformers(name):
    manifest = golden.manifest(f"diffusers.{name}.transformer")
    stored, official = lazy(shapes(f"diffusers.{name}.transformer")), shapes(f"{name}.safetensors")
    rules = mmdit_rules(count(stored, "transformer_blocks.{i}."))
    found, left = to_ours(stored, rules)
    prefix = "model.diffusion_model."
    wanted = {key.removeprefix(prefix): shape for key, shape in official.items() if key.startswith(prefix)}
    assert left == []
    assert {key: tensor.shape for key, tensor in found.items()} == wanted
    assert keys_of_our_model("transformer", wanted, manifest["config"]) == wanted
    back, left = to_theirs(found, rules)
    assert left == []
    assert {key: tensor.shape for key, tensor in back.items()} == {key: one.shape for key, one in stored.items()}


@pytest.mark.parametrize("name", SINGLE_FILES)
def test_rules_equal_the_recorded_key_map(name):
    """Recorded by running diffusers' own conversion on tagged rows."""
    recorded = dict(golden.manifest("keymap.diffusers_to_original")[f"transformer.{name}"])
    rules = mmdit_rules(golden.manifest(f"diffusers.{name}.transformer")["config"]["num_layers"])
    for rule in rules:
        for index, theirs in enumerate(rule.theirs):
            if theirs in recorded:
                found = recorded.pop(theirs)
                if isinstance(rule, Concat):
                    assert found[:2] == [rule.ours, "rows"]
                    assert found[2] == index * found[3]
                else:
                    assert found == ([rule.ours, "swap_halves"] if isinstance(rule, SwapHalves) else rule.ours)
    assert recorded == {}


def test_diffusers_vae():
    stored, official = lazy(shapes("diffusers.vae")), shapes("sd3_medium.safetensors")
    found, left = to_ours(stored, vae_rules(4, 2))
    prefix = "first_stage_model."
    assert left == []
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key.removeprefix(prefix): shape for key, shape in official.items() if key.startswith(prefix)
    }
    back, left = to_theirs(found, vae_rules(4, 2))
    assert left == []
    assert {key: tensor.shape for key, tensor in back.items()} == {key: one.shape for key, one in stored.items()}


@pytest.mark.parametrize(
    ("name", "component", "said"),
    [
        ("clip_l.safetensors", "clip_l", "text_encoder"),
        ("diffusers.text_encoder", "clip_l", "text_encoder"),
        ("clip_g.safetensors", "clip_g", "text_encoder_2"),
        ("diffusers.text_encoder_2", "clip_g", "text_encoder_2"),
        ("t5xxl_fp16.safetensors", "t5", "text_encoder_3"),
        ("t5xxl_fp8_e4m3fn.safetensors", "t5", "text_encoder_3"),
        ("diffusers.text_encoder_3", "t5", "text_encoder_3"),
    ],
)
def test_text_encoders(name, component, said):
    """The official config.json files agree with what the shapes say, too."""
    stored = shapes(name)
    models = split(stored).models
    assert (split(stored).left, split(stored).dropped) == ([], {})
    assert set(models) == {"t5" if component == "t5" else "clip"}
    stored.pop("encoder.embed_tokens.weight", None)  # the same table twice, see test_layouts
    config = golden.official_config(said)
    assert keys_of_our_model(component, stored, config) == stored
    bare = REGISTRY[component].config_of(stored, {})
    assert bare == REGISTRY[component].config_of(stored, config)


def test_all_in_one_files():
    """The prefixes of sd3_medium_incl_clips*: five models, nothing left."""
    stored = set(shapes("sd3_medium.safetensors"))
    for prefix, name in (
        ("text_encoders.clip_l.transformer.", "clip_l.safetensors"),
        ("text_encoders.clip_g.transformer.", "clip_g.safetensors"),
        ("text_encoders.t5xxl.transformer.", "t5xxl_fp8_e4m3fn.safetensors"),
    ):
        stored |= {prefix + key for key in shapes(name)}
    models = split(stored).models
    assert (split(stored).left, split(stored).dropped) == ([], {})
    assert set(models) == {"transformer", "vae", "clip_l", "clip_g", "t5"}
    assert (
        len(stored)
        == golden.manifest("sd3_medium_incl_clips.aio")["n_tensors"]["sd3_medium_incl_clips_t5xxlfp8.safetensors"]
    )


def test_official_vae_and_scheduler_configs():
    vae = REGISTRY["vae"].config_of(golden_vae_shapes(), golden.official_config("vae"))
    assert (vae.scale, vae.shift, vae.widths) == (1.5305, 0.0609, (128, 256, 512, 512))
    assert to_diffusers("vae", vae)["block_out_channels"] == [128, 256, 512, 512]
    assert golden.official_config("scheduler", "scheduler_config.json")["shift"] == 3.0


def golden_vae_shapes() -> dict[str, tuple[int, ...]]:
    prefix = "first_stage_model."
    stored = shapes("sd3_medium.safetensors")
    return {key.removeprefix(prefix): shape for key, shape in stored.items() if key.startswith(prefix)}


# Entries of official config.json files that change nothing that is computed here, and why.
WITHOUT_EFFECT = {
    **dict.fromkeys(("_diffusers_version", "transformers_version", "torch_dtype", "model_type"), "a note"),
    **dict.fromkeys(("attention_dropout", "dropout", "dropout_rate", "classifier_dropout"), "training only"),
    **dict.fromkeys(("initializer_factor", "initializer_range"), "training only"),
    **dict.fromkeys(("decoder_start_token_id", "num_decoder_layers", "use_cache", "output_past"), "T5's decoder only"),
    **dict.fromkeys(("is_encoder_decoder", "tie_word_embeddings"), "T5's decoder only"),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), "the tokenizer decides"),
    "force_upcast": "the dtype is an argument of the loader",
    **dict.fromkeys(("latents_mean", "latents_std"), "diffusers' SD3 pipelines do not read them"),
    "architectures": "held against the component",
    "_class_name": "held against the component",
    "projection_dim": "held against text_projection",
    "hidden_act": "taken",
}
PLACES = {"transformer": "transformer", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}


@pytest.mark.parametrize(("component", "place"), [*PLACES.items(), ("t5", "text_encoder_3")])
def test_every_entry_of_an_official_config_is_taken_or_settled_or_without_effect(component, place):
    said = golden.official_config(place)
    assert said.keys() - TAKEN.keys() - set(SETTLED) - set(CONSTANT) - WITHOUT_EFFECT.keys() == set()
    assert not (set(SETTLED) | set(CONSTANT) | TAKEN.keys() - {"num_attention_heads"}) & WITHOUT_EFFECT.keys()


def test_the_end_of_text_token_is_taken_and_written_back():
    stored = shapes("clip_l.safetensors")
    found = {key.removeprefix("text_encoders.clip_l.transformer."): shape for key, shape in stored.items()}
    for said, eos in ((2, None), (49407, 49407), (5, 5)):
        config = REGISTRY["clip_l"].config_of(found, {"eos_token_id": said})
        assert config.eos_id == eos
        assert to_diffusers("clip_l", config)["eos_token_id"] == said
