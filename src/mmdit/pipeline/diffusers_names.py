"""Errors for argument names of diffusers that have other names here, and for misspelt names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from mmdit.utils import shortened

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# By argument: the values that have no effect, and what to do instead of giving any other value.
Elsewhere = Mapping[str, tuple[tuple[Any, ...], str]]

_ONE_PROMPT = "all encoders read one prompt here: give it as prompt, or mix encoded prompts by hand, see pipe.encode"
_NO_ADAPTER = "there is no IP adapter"
CALL: Elsewhere = {
    "prompt_2": ((None,), _ONE_PROMPT),
    "prompt_3": ((None,), _ONE_PROMPT),
    "negative_prompt_2": ((None,), _ONE_PROMPT),
    "negative_prompt_3": ((None,), _ONE_PROMPT),
    "clip_skip": ((None, 0), "SD3 reads the last but one layer of CLIP; for another, encode by hand: prompt_embeds="),
    "return_dict": ((None, True), "a call returns a PipelineOutput: take .images of it"),
    "mu": ((None,), "give shift=math.exp(mu)"),
    "timesteps": ((None,), "give sigmas=[timestep / 1000, ...] with a 0 at the end"),
    "joint_attention_kwargs": ((None, {}), "look into attention with mmdit.patch and mmdit.attention_maps"),
    "cross_attention_kwargs": ((None, {}), "look into attention with mmdit.patch and mmdit.attention_maps"),
    "ip_adapter_image": ((None,), _NO_ADAPTER),
    "ip_adapter_image_embeds": ((None,), _NO_ADAPTER),
    "guidance_rescale": ((None, 0, 0.0), "give guidance=mmdit.Guidance(rescale=...)"),
    "eta": ((None, 0, 0.0), "noise on the way is the sampler's, such as sampler='euler_ancestral'"),
    "callback": ((None,), "give callback_on_step_end"),
    "callback_steps": ((None, 1), "give callback_on_step_end, which is called after every step"),
    "scheduler": ((None,), "give sampler= and schedule="),
    "cfg": ((None,), "give guidance_scale"),
    "cfg_scale": ((None,), "give guidance_scale"),
    "steps": ((None,), "give num_inference_steps"),
    "batch_size": ((None,), "give num_images_per_prompt"),
    "mask": ((None,), "give mask_image"),
    "masked_image_latents": ((None,), "models of 16 channels do not read the masked picture: leave it out"),
    "denoise": ((None,), "give strength"),
    "init_image": ((None,), "give image"),
    "control_image": ((None,), "ControlNet is not there yet"),
}
_PARTS = {
    "text_encoder": "clip_l",
    "text_encoder_2": "clip_g",
    "text_encoder_3": "t5",
    "tokenizer": "tokenizers.clip_l",
    "tokenizer_2": "tokenizers.clip_g",
    "tokenizer_3": "tokenizers.t5",
    "transformer": "transformer",
    "vae": "vae",
}
LOAD: Elsewhere = {
    name: ((), f"load the pipeline, then set pipe.{ours}, such as pipe.{ours} = None") for name, ours in _PARTS.items()
} | {
    "scheduler": ((), "give sampler= and schedule= in the call"),
    "use_safetensors": ((None, True), "only safetensors files are read"),
    "low_cpu_mem_usage": ((None, True, False), ""),
    "device_map": ((None,), "give device=, or offload='stages'"),
    "local_files_only": ((None, False), "give a folder: a local folder is never looked up on the hub"),
    "quantization_config": ((None,), "give quant=, such as quant='fp8'"),
    "safety_checker": ((None,), ""),
    "force_download": ((None, False), "remove the folder in the cache of the hub"),
}


def explains_names(elsewhere: Elsewhere) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A decorator that gives unknown keyword arguments an error with the name to use instead.

    Args:
        elsewhere: argument names of other libraries; they are ignored with a value that has no effect.

    Raises:
        TypeError: an argument is unknown; the message gives our name for it, or the nearest name.
    """

    def decorated(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        known = tuple(inspect.signature(function).parameters)

        @wraps(function)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            for name in [name for name in kwargs if name not in known]:
                _check_unknown(name, kwargs.pop(name), elsewhere, known)
            return function(*args, **kwargs)

        return checked

    return decorated


def _check_unknown(name: str, value: object, elsewhere: Elsewhere, known: tuple[str, ...]) -> None:
    if name in elsewhere:
        neutral, instead = elsewhere[name]
        if any(value is one or (type(value) is type(one) and value == one) for one in neutral):
            return
        raise TypeError(f"{name}={shortened(value)} is not taken here; {instead or 'leave it out'}")
    near = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(one for one in known[1:])}"
    raise TypeError(f"unknown argument {name!r}; {hint}")
