"""Arguments of a call, generated: each is taken, or refused by an error of ours before a model runs.

For as many seconds as the environment variable MMDIT_FUZZ_SECONDS says. A failure prints the number that makes it
again: MMDIT_FUZZ_SEED.
"""

import os
import random
import time
import traceback

import numpy as np
import pytest
import torch
from jaxtyping import config as jaxtyping_config

from fuzzing import SECONDS
from mmdit import Guidance, Pipeline, Ranged

FEWEST = 60  # calls, however slow the machine
REFUSALS = (ValueError, TypeError)
NAN = float("nan")
NUMBERS = [0, 1, -1, 2, 3, 16, 32, 40, True, False, None, 2**31, 2**63, 10**400, 0.5, 1.5, -0.0, 1e-300, 1e308, NAN]
NUMBERS += [
    float("inf"),
    np.int64(2),
    np.float32(0.3),
    np.bool_(True),
    np.array([1, 2]),
    torch.tensor(3),
    "7",
    "",
    b"1",
]
WORDS = ["euler", "eular", "", "resolution", "normal", "pt", "latent", "\ud800", "a" * 10_000, "cfg", 5, None, [], {}]


@pytest.fixture(scope="module")
def pipe(tiny_folders):
    jaxtyping_config.update("jaxtyping_disable", True)  # as users run it
    made = Pipeline.from_pretrained(tiny_folders["sd3.5-medium"])
    yield made
    jaxtyping_config.update("jaxtyping_disable", False)


class RanError(Exception):
    """A model has been reached: the arguments were taken."""


def tensors(pick: random.Random) -> object:
    shape = [pick.choice([0, 1, 2, 4, 16, 256]) for _ in range(pick.randrange(5))]
    shape = pick.choice([shape, [1, 16, 4, 4], [1, 333, 256], [1, 192], [2, 16, 4, 6]])
    dtype = pick.choice([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
    made = torch.zeros(shape).to(dtype)
    return pick.choice([made, made.numpy() if dtype == torch.float32 else made, made.tolist(), made.to("meta"), None])


def sigmas(pick: random.Random) -> object:
    levels = sorted((pick.choice([pick.random(), 1.0, 0.0, 0.999999]) for _ in range(pick.randrange(6))), reverse=True)
    return pick.choice(
        [levels, torch.tensor(levels), np.array(levels), [*levels, 0.0], levels[::-1], "1, 0", [NAN, 0.0]]
    )


def guidance(pick: random.Random) -> object:
    names = pick.sample(sorted(Guidance.__dataclass_fields__), pick.randrange(4))
    try:
        made = Guidance(**{name: pick.choice([*NUMBERS, *WORDS, (1,), (0, 99), (0.1, 0.9)]) for name in names})
    except REFUSALS:
        made = None
    return pick.choice([made, made, {"rescale": 0.7}, "apg", lambda x, sigma, cond, uncond: cond, 3, None])


def arguments(pick: random.Random, pipe: Pipeline) -> dict[str, object]:
    cond = pipe.encode("a") if pick.random() < 0.1 else None
    prompts = ["a", "", ["a", "b"], [], ("a",), 5, b"a", ["a", 3], cond, [cond], {"a": 1}]
    prompts += [Ranged(cond, 0.0, 0.5)] if cond is not None else []
    made = {
        "prompt": lambda: pick.choice(prompts),
        "negative_prompt": lambda: pick.choice([*prompts, None]),
        "seed": lambda: pick.choice([*NUMBERS, [1, 2], ["1"], [True], np.array([3]), torch.arange(2)]),
        "generator": lambda: pick.choice([torch.Generator(), [torch.Generator()], "cpu", 3, [None]]),
        "latents": lambda: tensors(pick),
        "prompt_embeds": lambda: tensors(pick),
        "pooled_prompt_embeds": lambda: tensors(pick),
        "negative_prompt_embeds": lambda: tensors(pick),
        "negative_pooled_prompt_embeds": lambda: tensors(pick),
        "sigmas": lambda: sigmas(pick),
        "guidance": lambda: guidance(pick),
        "skip_guidance_layers": lambda: pick.choice([[1], [99], [-1], "1", [True], 3, [0.5], np.array([1])]),
        "callback_on_step_end": lambda: pick.choice([print, 3, "print"]),
        "callback_on_step_end_tensor_inputs": lambda: pick.choice([["latents"], ["latent"], "latents", 3, [1]]),
        "sampler": lambda: pick.choice([*WORDS, lambda denoise, x, sigmas: iter(())]),
        "schedule": lambda: pick.choice(WORDS),
        "output_type": lambda: pick.choice(WORDS),
    }
    counts = ("height", "width", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "vae_tile", "shift")
    counts += ("max_sequence_length", "skip_layer_guidance_scale", "skip_layer_guidance_start")
    made |= {name: lambda: pick.choice(NUMBERS) for name in counts}
    made |= {name: lambda: pick.choice(WORDS) for name in ("promt", "prompt_2", "clip_skip", "return_dict", "steps")}
    return {"prompt": "a"} | {name: made[name]() for name in pick.sample(sorted(made), pick.randrange(1, 5))}


def test_every_argument_is_taken_or_refused(pipe, monkeypatch):
    def ran(*args, **kwargs):
        raise RanError

    for model in (pipe.transformer, pipe.vae.decoder):
        monkeypatch.setattr(model, "forward", ran)
    given, end = os.environ.get("MMDIT_FUZZ_SEED"), time.monotonic() + SECONDS
    number = first = int(given or random.randrange(2**32))
    outcomes = {"taken": 0, "refused": 0}
    while number < first + FEWEST or time.monotonic() < end:
        made = arguments(random.Random(number), pipe)
        try:
            pipe(progress=False, **made)
        except RanError:
            outcomes["taken"] += 1
        except (*REFUSALS, MemoryError) as error:
            outcomes["refused"] += 1
            line = traceback.extract_tb(error.__traceback__)[-1].line or ""
            assert line.startswith("raise"), f"MMDIT_FUZZ_SEED={number}: Python's own {error!r} at {line} for {made}"
            assert str(error), f"MMDIT_FUZZ_SEED={number}: an error without a message for {made}"
            assert len(str(error)) < 5_000, f"MMDIT_FUZZ_SEED={number}: {len(str(error))} characters for {made.keys()}"
        except Exception as error:
            raise AssertionError(f"MMDIT_FUZZ_SEED={number}: {type(error).__name__} for {made}") from error
        if given is not None:
            break
        number += 1
    assert given is not None or min(outcomes.values()) > 0, outcomes


FAILED_ONCE: list[dict[str, object]] = [
    {"guidance_scale": 10**400},
    {"num_inference_steps": True},
    {"seed": [True]},
    {"shift": 10**400},
    {"latents": torch.zeros(1, 16, 4, 4).to("meta")},
    {"skip_guidance_layers": 3},
    {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": 3},
    {"callback_on_step_end": 3},
    {"sigmas": []},
    {"schedule": {}},
    {"sigmas": "1, 0"},
    {"sigmas": torch.ones(2, 2)},
]


@pytest.mark.parametrize("number", range(len(FAILED_ONCE)))
def test_what_failed_once(pipe, number):
    with pytest.raises(REFUSALS) as caught:
        pipe("a", **FAILED_ONCE[number])
    assert (traceback.extract_tb(caught.tb)[-1].line or "").startswith("raise"), caught.value
