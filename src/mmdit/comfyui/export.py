"""Conversion between the settings of a picture and ComfyUI graphs, in both directions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from encoders.json_files import printable
from mmdit._version import __version__
from mmdit.checkpoints.load_pipeline import DEMO
from mmdit.checkpoints.locate import locate
from mmdit.comfyui.files import DEMO_CHECKPOINT
from mmdit.comfyui.graph import Graph, ValueProblemError, converted, is_link, read_graph
from mmdit.comfyui.nodes import NODES
from mmdit.comfyui.sampling import SAMPLERS, SCHEDULERS
from mmdit.pipeline.guidance import Guidance
from mmdit.pipeline.profiles import PROFILES
from mmdit.pipeline.settings import Settings, SettingsError

# The files of the official encoders, where the settings do not say that the checkpoint holds its own.
ENCODERS = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors")
_SKIPPING = (
    *("skip_guidance_layers", "skip_layer_guidance_scale", "skip_layer_guidance_start"),
    *("skip_layer_guidance_stop", "skip_layer_rescale"),
)
_SAID = (
    "guidance",
    "model_digest",
    "library_version",
    "format_version",
)  # settings with defaults that may have other values in an export
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
_ANOTHER = "run it as it is: mmdit run {path} --models FOLDER"


def to_workflow(
    settings: Settings,
    *,
    checkpoint: str | None = None,
    encoders: Sequence[str] | None = None,
    prefix: str = "mmdit",
) -> Graph:
    """Return a graph in API form with which ComfyUI draws a picture with these settings.

    With the profile "comfyui", ComfyUI draws the same picture up to rounding. Any other profile causes a warning.

    Args:
        settings: the settings of one picture, such as `output.settings[0]`.
        checkpoint: the name of the model's file in ComfyUI's checkpoints folder; None takes the name from the settings.
        encoders: file names of CLIP-L, CLIP-G and T5 in ComfyUI's text encoders folder; an empty sequence if the
            checkpoint holds them. None inspects the checkpoint if it exists locally, else takes the official names.
        prefix: the prefix of the file names that ComfyUI saves.

    Raises:
        SettingsError: ComfyUI has no such sampler, schedule or guidance, or the settings have no seed for this picture.
    """
    _check_known(settings)
    if settings.profile != "comfyui":
        said = f"the picture was drawn under profile {settings.profile!r}; ComfyUI's will differ from it"
        warnings.warn(said, stacklevel=2)
    names = _encoders_of(settings.model) if encoders is None else tuple(encoders)
    graph: Graph = {}
    model = _added(graph, "CheckpointLoaderSimple", ckpt_name=checkpoint or _checkpoint_of(settings.model))
    clip = [model, 1] if not names else [_loader(graph, names), 0]
    shifted = [_added(graph, "ModelSamplingSD3", model=[model, 0], shift=settings.shift), 0]
    guided = _with_guidance(graph, settings, shifted)
    texts = [
        _added(graph, "CLIPTextEncode", text=text, clip=clip) for text in (settings.prompt, settings.negative_prompt)
    ]
    latent = _added(graph, "EmptySD3LatentImage", width=settings.width, height=settings.height, batch_size=1)
    drawn = _added(
        graph,
        "KSampler",
        model=guided,
        seed=settings.seed,
        steps=settings.num_inference_steps,
        cfg=settings.guidance_scale,
        sampler_name=settings.sampler,
        scheduler=settings.schedule,
        positive=[texts[0], 0],
        negative=[texts[1], 0],
        latent_image=[latent, 0],
        denoise=1.0,
    )
    picture = _added(graph, "VAEDecode", samples=[drawn, 0], vae=[model, 2])
    _added(graph, "SaveImage", images=[picture, 0], filename_prefix=prefix)
    return graph


def workflow_of(settings: Settings) -> Graph | None:
    """Return the graph to write into a picture's PNG: for profile "comfyui" where ComfyUI draws the same, else None."""
    if settings.profile != "comfyui":
        return None
    try:
        return to_workflow(settings)
    except SettingsError:
        return None


def from_workflow(source: Mapping[str, Any] | str | Path) -> Settings:
    """Read the settings of a picture from a simple graph: one KSampler, an empty latent, and prompts.

    Settings that a graph does not contain are empty: model, dtype and device.

    Args:
        source: a graph, a JSON file, or a PNG that ComfyUI wrote.

    Raises:
        SettingsError: settings cannot express the graph; the node is named.
        WorkflowError, JSONError: the source is not a graph.
    """
    return _Reading(read_graph(source), source).settings()


def _check_known(settings: Settings) -> None:
    optional = [one for one in fields(Settings) if one.default is not MISSING and one.name not in _SAID]
    if more := [one.name for one in optional if getattr(settings, one.name) != one.default]:
        raise SettingsError(
            f"the picture was drawn with {', '.join(more)}, which is not exported; plain drawings from noise are, with "
            "skip-layer guidance"
        )
    if settings.quant is not None:
        raise SettingsError(f"the weights were quantized ({settings.quant}), which is not exported")
    for kind, name, known in (("sampler", settings.sampler, SAMPLERS), ("schedule", settings.schedule, SCHEDULERS)):
        if name not in known:
            raise SettingsError(f"ComfyUI has no {kind} {name!r}; it has {', '.join(known)}")
    if settings.seed is None or settings.seed < 0:
        raise SettingsError(f"the picture's seed is {settings.seed}; ComfyUI draws from a seed of at least 0")
    if settings.max_sequence_length not in (None, PROFILES["comfyui"].text.t5_length):
        raise SettingsError(f"T5 reads {settings.max_sequence_length} tokens here; ComfyUI always reads 77 or more")
    own = Guidance.from_text(settings.guidance)
    plain = {name: getattr(Guidance(), name) for name in _SKIPPING}
    if replace(own, **plain) != Guidance():
        raise SettingsError(f"ComfyUI has no nodes for the guidance {settings.guidance!r}, except skip-layer guidance")


def _added(graph: Graph, name: str, **inputs: Any) -> str:
    """Add a node; returns its id."""
    id = str(len(graph) + 1)
    graph[id] = {"class_type": name, "inputs": inputs, "_meta": {"title": name}}
    return id


def _loader(graph: Graph, names: Sequence[str]) -> str:
    numbered = {f"clip_name{i}": name for i, name in enumerate(names, 1)}
    match len(names):
        case 1:
            return _added(graph, "CLIPLoader", clip_name=names[0], type="sd3")
        case 2:
            return _added(graph, "DualCLIPLoader", **numbered, type="sd3")
        case 3:
            return _added(graph, "TripleCLIPLoader", **numbered)
    raise SettingsError(f"{len(names)} text encoders are given, expected up to three")


def _with_guidance(graph: Graph, settings: Settings, model: list[Any]) -> list[Any]:
    own = Guidance.from_text(settings.guidance).of(PROFILES["comfyui"])
    if not own.skip_guidance_layers:
        return model
    layers = ", ".join(map(str, own.skip_guidance_layers))
    inputs = {
        "scale": own.skip_layer_guidance_scale,
        "start_percent": own.skip_layer_guidance_start,
        "end_percent": own.skip_layer_guidance_stop,
        "rescaling_scale": own.skip_layer_rescale,
    }
    skipping = _added(graph, "SkipLayerGuidanceDiT", model=model, double_layers=layers, single_layers="", **inputs)
    return [skipping, 0]


def _checkpoint_of(model: str) -> str:
    if model == DEMO:
        return DEMO_CHECKPOINT
    name = model.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name if name.endswith(".safetensors") else f"{name or 'model'}.safetensors"


def _encoders_of(model: str) -> tuple[str, ...]:
    if model == DEMO:
        return ()
    path = Path(model)
    holds = path.is_file() and path.suffix == ".safetensors" and "clip_l" in locate(path).weights
    return () if holds else ENCODERS


class _Reading:
    """Reads the settings from a graph."""

    def __init__(self, graph: Graph, source: object) -> None:
        self.graph = graph
        self.where = str(source) if isinstance(source, str | Path) else "the workflow"

    def settings(self) -> Settings:
        """The settings of the single picture that the graph draws."""
        sampler = self._only("KSampler")
        inputs = self._inputs(sampler)
        if inputs["denoise"] != 1:
            raise self._more(sampler, f"it starts from a picture (denoise {inputs['denoise']})")
        shift, guidance = self._model(inputs["model"])
        width, height = self._size(inputs["latent_image"])
        return Settings(
            prompt=self._text(inputs["positive"]),
            negative_prompt=self._text(inputs["negative"]),
            seed=inputs["seed"],
            height=height,
            width=width,
            num_inference_steps=inputs["steps"],
            guidance_scale=inputs["cfg"],
            sampler=str(inputs["sampler_name"]).removesuffix("_gpu"),
            schedule=str(inputs["scheduler"]),
            shift=shift,
            profile="comfyui",
            max_sequence_length=None,
            model="",
            dtype="",
            quant=None,
            device="",
            guidance=guidance,
            library_version=__version__,
        )

    def _only(self, name: str) -> str:
        classes = {id: str(one.get("class_type")) for id, one in self.graph.items() if isinstance(one, dict)}
        stages = [id for id, one in classes.items() if one in _SAMPLERS]
        if [classes[id] for id in stages] != [name]:
            raise SettingsError(
                f"{self.where} draws in {len(stages)} stages, expected one {name}; {_ANOTHER.format(path=self.where)}"
            )
        return stages[0]

    def _name(self, id: str) -> str:
        return str(self.graph[id]["class_type"])

    def _inputs(self, id: str) -> dict[str, Any]:
        """The inputs of a node, checked to include all that its class requires."""
        inputs = self.graph[id].get("inputs")
        found: dict[str, Any] = inputs if isinstance(inputs, dict) else {}
        if missing := [one.name for one in NODES[self._name(id)].inputs if one.name not in found and not one.optional]:
            raise SettingsError(f"{self.where}: node {id} ({self._name(id)}) lacks {', '.join(missing)}")
        for one in NODES[self._name(id)].inputs:
            if one.is_widget and isinstance(found.get(one.name), list | dict):
                raise self._more(id, f"its {one.name} comes from another node")
        declared = NODES[self._name(id)].by_name
        try:
            return {name: converted(declared[name], value) for name, value in found.items() if name in declared}
        except ValueProblemError as error:
            raise SettingsError(
                f"{self.where}: node {id} ({self._name(id)}), {error.problem.input}: {error}"
            ) from error

    def _linked(self, value: Any, *names: str) -> str:
        """The id of the node that a link comes from; its class must be one of `names`."""
        one = self.graph.get(value[0]) if is_link(value) and isinstance(value[0], str) else None
        if not isinstance(one, dict):
            raise SettingsError(f"{self.where}: a wire leads to no node: {printable(str(value), 60)}")
        id, name = value[0], printable(str(one.get("class_type")), 60)
        if name not in names:
            raise self._more(id, f"settings can say {', '.join(names)} there")
        return str(id)

    def _model(self, wire: Any) -> tuple[float, str]:
        """The shift of a chain of model patches, and its guidance as text."""
        usual, guidance = PROFILES["comfyui"].shift, ""
        shift: float | None = None  # the shift of the last such node before the sampler takes precedence
        for _ in range(len(self.graph)):
            id = self._linked(
                wire,
                *("ModelSamplingSD3", "SkipLayerGuidanceSD3", "SkipLayerGuidanceDiT"),
                *("CheckpointLoaderSimple", "UNETLoader"),
            )
            name, inputs = self._name(id), self._inputs(id)
            if name in ("CheckpointLoaderSimple", "UNETLoader"):
                if inputs.get("weight_dtype", "default") != "default":
                    raise self._more(id, f"it rounds the weights to {inputs['weight_dtype']}")
                return usual if shift is None else shift, guidance
            if name == "ModelSamplingSD3":
                shift = inputs["shift"] if shift is None else shift
            elif guidance or shift not in (None, usual):
                what = "it is the second of its kind" if guidance else "its window counts with the shift that it gets"
                raise self._more(id, what)
            else:
                guidance = _skipping(inputs)
            wire = inputs["model"]
        raise SettingsError(f"{self.where}: its model patches need each other in a circle")

    def _size(self, wire: Any) -> tuple[int, int]:
        id = self._linked(wire, "EmptySD3LatentImage", "EmptyLatentImage")
        inputs = self._inputs(id)
        if inputs["batch_size"] != 1:
            raise self._more(id, f"it draws {inputs['batch_size']} pictures from one seed")
        return inputs["width"] // 8 * 8, inputs["height"] // 8 * 8

    def _text(self, wire: Any) -> str:
        return str(self._inputs(self._linked(wire, "CLIPTextEncode"))["text"])

    def _more(self, id: str, what: str) -> SettingsError:
        name = printable(str(self.graph[id].get("class_type")), 60)
        said = f"{self.where}: settings cannot say what node {id} ({name}) does: {what}"
        return SettingsError(f"{said}; {_ANOTHER.format(path=self.where)}")


def _skipping(inputs: Mapping[str, Any]) -> str:
    """Skip-layer guidance as text that `mmdit.Guidance.from_text` parses."""
    layers = str(inputs.get("layers", inputs.get("double_layers", "")))
    numbers = tuple(int(one) for one in layers.replace(",", " ").split() if one.isdecimal())
    return Guidance(
        skip_guidance_layers=numbers,
        skip_layer_guidance_scale=float(inputs["scale"]),
        skip_layer_guidance_start=float(inputs["start_percent"]),
        skip_layer_guidance_stop=float(inputs["end_percent"]),
        skip_layer_rescale=float(inputs.get("rescaling_scale", 0.0)),
    ).to_text()
