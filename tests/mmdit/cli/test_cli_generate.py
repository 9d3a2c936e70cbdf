"""`mmdit generate`: prompts, seeds, names, grids, pictures drawn again, and what is said when something is wrong."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit import PROFILES, Guidance, Pipeline, read_settings, save_png
from mmdit.cli import app, drawing, generate, usage
from mmdit.cli.app import main
from mmdit.cli.generate import EXAMPLES
from mmdit.cli.outputs import Output
from mmdit.pipeline.profiles import PRESETS
from mmdit.pipeline.settings import Settings
from samplers import SCHEDULES, SOLVERS, resolution_shift

RED, BLUE = "a red circle", "a blue star"
EMBEDDED_PROMPT = "a large red circle above a blue star, on a white background"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(tiny_folders, here):
    """Run `generate` with a tiny model, small and in one step on the CPU; later options win."""
    small = ["-m", str(tiny_folders["sd3.5-medium"]), "--height", "32", "--width", "48"]
    return lambda *words: main(["generate", *small, "--device", "cpu", "--steps", "1", *words])


@pytest.fixture
def loaded(monkeypatch) -> list[dict]:
    """What the pipeline is loaded with, in place of loading it."""
    seen: list[dict] = []

    def load(source, **options):
        about = {"revision": source.revision, "variant": source.variant}
        if source.is_demo:
            about = {}
        elif Path(source.path).is_file():
            about = {**(source.others or {}), "tokenizers": source.tokenizers}
        seen.append({"model": source.path, **about, **options})
        raise ValueError("enough")

    monkeypatch.setattr(Pipeline, "load", load)
    return seen


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, np.int16)


def saying(path: str, **settings: object) -> str:
    """A picture with these settings, and others of the embedded model."""
    numbers = {"seed": 0, "height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, "shift": 3.0}
    words = {"sampler": "euler", "schedule": "normal", "profile": "diffusers", "model": "demo", "dtype": "float32"}
    texts = {"prompt": RED, "negative_prompt": "", "device": "cpu"}
    about = Settings(**({"max_sequence_length": None, "quant": None} | numbers | words | texts)).to_json() | settings
    return str(save_png(Image.new("RGB", (16, 16)), path, about))


# ---- what to draw


def test_every_prompt_with_every_seed_each_as_if_alone(tiny, here, capsys):
    assert tiny(RED, BLUE, "--seed", "3", "-4", "-o", "new/x.png") == 0
    wanted = [(RED, 3), (RED, -4), (BLUE, 3), (BLUE, -4)]
    lines = [f"wrote new/x-{i}.png (48 x 32, seed {seed}; picture {i + 1} of 4)" for i, (_, seed) in enumerate(wanted)]
    assert capsys.readouterr().out.splitlines() == lines
    for i, (prompt, seed) in enumerate(wanted):
        found = read_settings(f"new/x-{i}.png")
        assert (found["prompt"], found["seed"]) == (prompt, seed)
    for i, (prompt, seed) in list(enumerate(wanted))[::3]:
        assert tiny(prompt, "--seed", str(seed), "-o", "alone.png") == 0
        assert Path("alone.png").read_bytes() == Path(f"new/x-{i}.png").read_bytes()


# The first prompt takes several chunks of CLIP and more than 77 tokens of T5, where they are not cut.
@pytest.mark.parametrize("profile", ["diffusers", "comfyui", "reference"])
def test_a_batch_draws_what_one_by_one_draws(tiny, here, profile):
    prompts = ["r g " * 100, RED, BLUE, "a (green:1.5) ring"]
    options = [*prompts[1:], "--seed", "1", "2", "--profile", profile]
    calls = []
    drawn = Pipeline.__call__
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prompts are cut
        patch.setattr(Pipeline, "__call__", lambda *a, **k: calls.append(len(a[1])) or drawn(*a, **k))
        assert tiny(prompts[0], *options, "--batch", "3", "-o", "batch.png") == 0
        assert calls == ([3, 3, 2] if profile == "diffusers" else [2, 3, 3])
        assert tiny(prompts[0], *options, "-o", "one.png") == 0
    for i in range(8):
        assert np.abs(pixels(f"batch-{i}.png") - pixels(f"one-{i}.png")).max() <= 1  # rounding
        assert read_settings(f"batch-{i}.png") == read_settings(f"one-{i}.png")


@pytest.mark.parametrize("source", ["lines.txt", "-"])
def test_prompts_of_a_file(tiny_folders, here, monkeypatch, source):
    content = b"\xef\xbb\xbf  a red circle\r\n\r\n \t\na caf\xc3\xa9\xe2\x80\xa8, two"
    Path("lines.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    small = ["-m", str(tiny_folders["sd3.5-medium"]), "--height", "16", "--width", "16", "--steps", "1"]
    assert main(["generate", "--prompts", source, *small, "-o", "x.png"]) == 0
    assert [read_settings(f"x-{i}.png")["prompt"] for i in range(2)] == [RED, "a café\u2028, two"]
    assert len(list(here.iterdir())) == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no such file (a prompt itself"), (b"\n \n", "holds no prompt"), (b"\xff\xfe", "no UTF-8 text")],
)
def test_files_that_hold_no_prompts(here, loaded, capsys, content, says):
    if content is not None:
        Path("lines.txt").write_bytes(content)
    assert main(["generate", "--prompts", "lines.txt"]) == 1
    assert says in capsys.readouterr().err
    assert loaded == []


# ---- where to


def test_without_output_nothing_is_replaced(tiny, here):
    def names() -> set[str]:
        return {path.name for path in here.iterdir()}

    assert tiny(RED) == 0
    assert names() == {"picture.png"}
    Path("picture.png").write_bytes(b"mine")
    assert tiny(RED, "--grid") == 0
    assert tiny(RED, "--grid") == 0
    assert names() == {"picture.png", "picture-1.png", "picture-2.png", "picture-grid.png", "picture-grid-1.png"}
    Path("picture-8.png").write_bytes(b"mine")
    assert tiny(RED, "--seed", "1", "2", "3") == 0
    assert {"picture-09.png", "picture-10.png", "picture-11.png"} < names()
    assert Path("picture.png").read_bytes() == Path("picture-8.png").read_bytes() == b"mine"


def test_names_that_another_program_takes_meanwhile(here):
    output, image = Output(Path("x.png"), keep=True), Image.new("RGB", (1, 1))
    names = output.names()
    Path("x.png").write_bytes(b"other")
    assert output.write(names, image, {"format_version": 1}) == Path("x-1.png")
    with pytest.raises(ValueError, match="format_version"):
        output.write(names, image, {})
    assert {path.name for path in here.iterdir()} == {"x.png", "x-1.png"}
    assert Path("x.png").read_bytes() == b"other"


def test_with_output_files_are_replaced_and_numbers_are_equally_long(tiny, here, capsys):
    Path("x-03.png").write_bytes(b"old")
    assert tiny(RED, "--seed", *map(str, range(11)), "-o", "x.png", "--batch", "11") == 0
    assert sorted(path.name for path in here.iterdir()) == [f"x-{i:02}.png" for i in range(11)]
    assert read_settings("x-03.png")["seed"] == 3


def test_grid_has_a_row_for_each_prompt_and_a_column_for_each_seed(tiny, here, capsys):
    assert tiny(RED, BLUE, "", "--seed", "1", "2", "-o", "x.png", "--grid") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "wrote x-grid.png (96 x 96, grid of 3 x 2)"
    sheet = pixels("x-grid.png")
    for i in range(6):
        row, column = divmod(i, 2)
        cell = sheet[row * 32 : row * 32 + 32, column * 48 : column * 48 + 48]
        assert np.array_equal(cell, pixels(f"x-{i}.png"))
    assert read_settings("x-grid.png")["pictures"] == [read_settings(f"x-{i}.png") for i in range(6)]
    assert main(["generate", "--settings", "x-grid.png"]) == 1
    assert "x-grid.png is a grid of 6 pictures" in capsys.readouterr().err
    assert tiny(RED, "-o", "x.png", "--grid", "sheets/all.png") == 0
    assert np.array_equal(pixels("sheets/all.png"), pixels("x.png"))


# ---- drawn again


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--profile", "comfyui", "--dtype", "bfloat16", "-n", BLUE, "--guidance-scale", "2.5", "--height", "88"],
        ["--profile", "reference", "--sampler", "euler", "--width", "64", "--max-sequence-length", "12"],
        ["--preset", "turbo", "--dtype", "float64", "--height", "48", "--width", "64"],
    ],
)
def test_the_embedded_model_draws_a_picture_again_bit_by_bit(here, capsys, options):
    words = ["--steps", "2", "--seed", "11", "12", "-o", "x.png", "--device", "cpu"]
    assert main(["generate", EMBEDDED_PROMPT, *words, *options]) == 0
    assert main(["generate", "--settings", "x-1.png", "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("x-1.png").read_bytes()
    found = read_settings("again.png")
    wanted = dict(zip(options[::2], options[1::2], strict=True))
    assert found["seed"] == 12
    assert found["model"] == "demo"
    assert found["dtype"] == wanted.get("--dtype", "float32")
    assert found["profile"] == wanted.get("--profile", "diffusers")


def test_the_command_draws_what_the_pipeline_draws(here):
    assert main(["generate", EMBEDDED_PROMPT, "--steps", "1", "--seed", "5", "-o", "x.png", "--device", "cpu"]) == 0
    drawn = Pipeline.demo()(EMBEDDED_PROMPT, num_inference_steps=1, seed=5)
    assert np.array_equal(pixels("x.png"), np.asarray(drawn.images[0]))
    assert read_settings("x.png") == drawn.settings[0].to_json()


def test_a_shift_that_came_from_a_preset_comes_back(tiny_folders, here):
    folder = str(tiny_folders["sd3.5-medium"])
    assert main(["convert", folder, "one.safetensors", "--layout", "single"]) == 0
    model = ["-m", "one.safetensors", "--tokenizers", folder]
    small = ["--height", "32", "--width", "32", "--steps", "2"]
    assert main(["generate", RED, *model, *small, "--preset", "sd3_medium", "-o", "x.png"]) == 0
    assert read_settings("x.png")["shift"] == 1.0
    assert main(["generate", "--settings", "x.png", "--tokenizers", folder, "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("x.png").read_bytes()


def test_what_is_given_beside_the_settings_wins(tiny, here, tiny_folders):
    assert tiny(RED, "-n", BLUE, "--seed", "7", "--guidance-scale", "3", "--dtype", "float64", "-o", "x.png") == 0
    changes = {
        "prompt": [BLUE],
        "negative_prompt": ["-n", ""],
        "height": ["--height", "16"],
        "width": ["--width", "16"],
        "num_inference_steps": ["--steps", "2"],
        "guidance_scale": ["--guidance-scale", "1.5"],
        "guidance": ["--guidance", "rescale=0.5"],
        "sampler": ["--sampler", "dpmpp_2m"],
        "schedule": ["--schedule", "simple"],
        "shift": ["--shift", "2.5"],
        "profile": ["--profile", "comfyui"],
        "max_sequence_length": ["--max-sequence-length", "9"],
        "model": ["-m", str(tiny_folders["sd3-medium"])],
        "dtype": ["--dtype", "bfloat16"],
        "seed": ["--seed", "8"],
    }
    before = read_settings("x.png")
    for names in (["num_inference_steps"], list(changes)):
        words = [word for name in names for word in changes[name]]
        assert main(["generate", "--settings", "x.png", "-o", "y.png", *words]) == 0
        after = read_settings("y.png")
        changed = {key for key in before if before[key] != after[key]}
        assert changed == set(names) | ({"model_digest"} if "model" in names else set())
        assert {str(after[name]) for name in names} == {changes[name][-1] for name in names}
    Path("lines.txt").write_text("one\ntwo\n")
    assert main(["generate", "--prompts", "lines.txt", "--settings", "x.png", "-o", "z.png"]) == 0
    assert [read_settings(f"z-{i}.png")["prompt"] for i in range(2)] == ["one", "two"]


def test_settings_that_cannot_be_drawn_again(here, capsys, loaded):
    cases = {
        "no seed of its own": {"seed": None},
        "unknown profile 'mine'; Known: diffusers, comfyui, reference. What the command line": {"profile": "mine"},
        "unknown sampler 'eular'; did you mean 'euler'": {"sampler": "eular"},
        "unknown dtype 'float8'": {"dtype": "float8"},
        "does not say with which model": {"model": ""},
        "height is 'tall'": {"height": "tall"},
    }
    for says, change in cases.items():
        assert main(["generate", "--settings", saying("edited.png", **change)]) == 1
        assert says in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save("foreign.png")
    for path, says in {"foreign.png": "has no 'mmdit' chunk", "none.png": "No such file"}.items():
        assert main(["generate", "--settings", path]) == 1
        assert says in capsys.readouterr().err
    assert loaded == []


def test_settings_that_another_option_makes_drawable(here, capsys):
    assert main(["generate", "--settings", saying("x.png", seed=None), "--seed", "3"]) == 0
    assert read_settings("picture.png")["seed"] == 3
    assert main(["generate", "--settings", saying("x.png", profile="mine"), "--profile", "comfyui"]) == 0
    assert read_settings("picture-1.png")["profile"] == "comfyui"
    assert "embedded model" not in capsys.readouterr().err  # the picture has said so


def test_settings_of_another_shift(here):
    """The picture's shift counts, whatever the model's; another one that is given counts more."""
    assert main(["generate", "--settings", saying("x.png", shift=1.5, num_inference_steps=2)]) == 0
    assert read_settings("picture.png")["shift"] == 1.5
    said = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 1.0, "shift": 1.5}
    wanted = Pipeline.demo()(RED, seed=0, **said).images[0]
    assert np.array_equal(pixels("picture.png"), np.asarray(wanted))
    assert main(["generate", "--settings", "x.png", "--shift", "resolution", "-o", "y.png"]) == 0
    assert read_settings("y.png")["shift"] == pytest.approx(resolution_shift(1), abs=1e-12)


def test_a_picture_is_drawn_again_on_the_device_that_it_was_drawn_on(here, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(drawing, "device_of", lambda name: asked.append(name) or torch.device("cpu"))
    for words in (["--settings", saying("x.png")], ["--settings", "x.png", "--device", "there"], [RED, "--steps", "1"]):
        assert main(["generate", *words]) == 0
    assert asked == ["cpu", "there", None]


def test_a_picture_of_a_device_that_is_not_here(here, capsys):
    assert main(["generate", "--settings", saying("x.png", device="meta")]) == 0
    assert "x.png was drawn on meta, which is not here" in capsys.readouterr().err
    assert main(["generate", "--settings", "x.png", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == ""


def test_nothing_is_downloaded_because_of_a_picture(here, loaded, capsys):
    picture = saying("x.png", model="someone/model")
    assert main(["generate", "--settings", picture]) == 1
    assert loaded == []
    assert "--model someone/model" in capsys.readouterr().err
    assert main(["generate", "--settings", picture, "-m", "someone/model", "--device", "cpu"]) == 1
    assert [one["model"] for one in loaded] == ["someone/model"]  # asked for


def test_a_picture_of_other_weights_is_told(here, capsys):
    few = {"height": 32, "width": 32, "num_inference_steps": 1}
    assert main(["generate", "--settings", saying("x.png", model_digest="0" * 16, **few), "-o", "y.png"]) == 0
    assert "x.png was drawn with other weights" in capsys.readouterr().err
    assert main(["generate", "--settings", "y.png", "-o", "z.png"]) == 0
    assert "weights" not in capsys.readouterr().err


def test_inspect_shows_the_settings_of_a_picture(tiny, here, capsys):
    assert tiny("a café", "-o", "x.PNG") == 0
    capsys.readouterr()
    assert main(["inspect", "x.PNG"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == read_settings("x.PNG")
    assert '\n  "prompt": "a café",\n' in out
    Image.new("RGB", (8, 8)).save("foreign.png")
    assert main(["inspect", "foreign.png"]) == 1
    assert "has no 'mmdit' chunk" in capsys.readouterr().err


# ---- with which model and how


def test_options_reach_the_loading(here, loaded, capsys):
    Path("one.safetensors").touch()
    cpu = ["--device", "cpu"]
    plain: dict = {
        "offload": None,
        "memory": None,
        "quant": None,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "profile": PROFILES["diffusers"],
        "preset": None,
    }
    hub = {"model": "someone/model", "revision": "main", "variant": "fp16"}
    assert main(["generate", RED, "-m", "someone/model", "--revision", "main", "--variant", "fp16", *cpu]) == 1
    others = dict.fromkeys(("clip_l", "clip_g", "vae", "tokenizers")) | {"t5": "t5.safetensors"}
    words = ["--t5", "t5.safetensors", "--offload", "stages", "--dtype", "float16", *cpu]
    assert main(["generate", RED, "-m", "one.safetensors", *words, "--preset", "turbo", "--profile", "reference"]) == 1
    profile = PRESETS["turbo"].applied(PROFILES["reference"])
    file = plain | others | {"offload": "stages", "dtype": torch.float16, "profile": profile, "preset": "turbo"}
    Path("demo").mkdir()
    for model in ("demo", "./demo"):
        assert main(["generate", RED, "-m", model, *cpu]) == 1
    folder = {"model": "./demo", "revision": None, "variant": None}
    assert loaded == [plain | hub, file | {"model": "one.safetensors"}, plain | {"model": "demo"}, plain | folder]
    assert "note: drawing with the embedded model" in capsys.readouterr().err


def test_options_reach_the_drawing(tiny, here, monkeypatch):
    seen = {}
    drawn = Pipeline.__call__

    def call(self, *texts, **options):
        seen.update(options, texts=texts)
        return drawn(self, *texts, **options)

    monkeypatch.setattr(Pipeline, "__call__", call)
    words = "--height 16 --width 32 --steps 2 --guidance-scale 2 --sampler dpmpp_2m --schedule beta --shift 2"
    words = [*words.split(), "--vae-tile", "64", "--guidance", "kind=apg momentum=-0.5"]
    assert tiny(RED, "-n", BLUE, *words, "--max-sequence-length", "9", "--seed", "4", "--quiet") == 0
    assert seen == {
        "texts": ([RED], BLUE),
        "height": 16,
        "width": 32,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "guidance": Guidance(kind="apg", momentum=-0.5),
        "sampler": "dpmpp_2m",
        "schedule": "beta",
        "shift": 2.0,
        "vae_tile": 64,
        "max_sequence_length": 9,
        "seed": [4],
        "progress": False,
    }
    assert tiny(RED, "--offload", "stages") == 0
    assert seen["progress"] is None


# ---- what is said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sampler", "eular"], "did you mean 'euler'"),
        (["--schedule", "nromal"], "did you mean 'normal'"),
        (["--profile", "comfy"], "did you mean 'comfyui'"),
        (["--preset", "trubo"], "did you mean 'turbo'"),
        (["--steps", "0"], "--steps must be a whole number of at least 1"),
        (["--height", "-16"], "--height must be"),
        (["--width", "0"], "--width must be"),
        (["--batch", "0"], "--batch must be"),
        (["--vae-tile", "7"], "--vae-tile must be a whole number of at least 64, got 7"),
        (["--max-sequence-length", "1"], "--max-sequence-length must be a whole number of at least 2"),
        (["--guidance-scale", "nan"], "--guidance-scale must be a finite number"),
        (["--guidance", "momentun=1"], "unknown guidance setting 'momentun'; did you mean 'momentum'"),
        (["--guidance", "rescale=x"], "guidance 'rescale=x': 'x' is no value of it"),
        (["--guidance", "rescale=2"], "guidance rescale must be a finite number from 0 to 1, got 2.0"),
        (["--seed", "1", str(2**64)], "at most 64 bits"),
        (["-n", "\udc80"], "no Unicode text"),
        (["-o", "picture.jpg"], "must end in .png"),
        (["-o", "folder.png"], "folder.png is a folder"),
        (["-o", "file/x.png"], "file is a file, expected a folder"),
        (["-o", "x.png", "--seed", "1", "2", "--grid", "x-1.png"], "x-1.png is where a picture goes"),
        (["--grid", "picture.png"], "picture.png is where a picture goes"),
        (["--grid", "a cat"], "prompts go before --grid"),
        (["--device", "meta"], "--device meta: there is none here"),
        (["--vae", "x"], "--vae goes with a single file as --model, no --model is given"),
        (["--revision", "x"], "--revision goes with a repository of the Hugging Face Hub"),
        (["-m", "file", "--variant", "fp16"], "--variant goes with a repository of the Hugging Face Hub"),
    ],
)
def test_all_is_checked_before_weights_are_loaded(here, loaded, capsys, words, says):
    Path("folder.png").mkdir()
    Path("file").touch()
    assert main(["generate", "x", *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("mmdit: ")
    assert error.count("\n") == 1
    assert loaded == []
    assert {path.name for path in here.iterdir()} == {"folder.png", "file"}


def test_a_folder_that_nothing_can_be_written_to(here, loaded, capsys, monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mmdit.cli.outputs.TemporaryFile", refuse)
    assert main(["generate", "x", "-o", "new/x.png"]) == 2
    assert f"nothing can be written to {here} (Permission denied)" in capsys.readouterr().err
    assert loaded == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "there is no prompt"),
        (["--grid", "a cat"], "prompts go before --grid"),
        (["--seed", "1", "a cat"], "'a cat' is no whole number; prompts go before --seed"),
        (["a cat", "--prompts", "x.txt"], "both given"),
        (["--settings", "x.png", "--preset", "turbo"], "--settings and --preset are both given"),
        (["a cat", "--dtype", "int8"], "invalid choice"),
        (["a cat", "--offload", "stage"], "invalid choice"),
        (["a cat", "--memory", "8 apples"], "memory must be a size"),
        (["a cat", "--memory", "8GB", "--offload", "stages"], "not allowed with"),
    ],
)
def test_wrong_usage_exits_with_two_and_loads_no_torch(words, says):
    code = "import sys; from mmdit.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "generate", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_of_the_hub_are_for_users_and_our_bugs_are_not(here, capsys, monkeypatch):
    assert main(["generate", "x", "-m", "someone/none"]) == 1
    assert "mmdit: someone/none could not be downloaded" in capsys.readouterr().err

    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Pipeline, "load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "x"])
    with pytest.raises(ValueError, match="at least 1"):
        main(["generate", "x", "--steps", "0", "--debug"])


def test_stopped_and_out_of_memory(here, capsys, monkeypatch):
    for error, code, says in (
        (KeyboardInterrupt(), 130, "mmdit: stopped\n"),
        (MemoryError("too much"), 1, "mmdit: too much. On the command line: --memory 8GB"),
    ):

        def fail(*args: object, error: BaseException = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(Pipeline, "__call__", fail)
        assert main(["generate", "x"]) == code
        assert says in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_quiet_hides_notes_and_warnings(tiny_folders, here, capsys):
    """A model without T5 warns; a negative prompt that is not read and the embedded model make notes."""
    shutil.copytree(tiny_folders["sd3.5-medium"], "no-t5")
    shutil.rmtree("no-t5/text_encoder_3")
    capsys.readouterr()  # what made the folder
    words = ["generate", RED, "-m", "no-t5", "--height", "16", "--width", "16", "--steps", "1", "-n", BLUE]
    words += ["--guidance-scale", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        assert main(words) == 0
        said = capsys.readouterr().err.splitlines()
        assert main([*words, "--quiet"]) == 0
        assert capsys.readouterr().err == ""
        assert main([*words, "--steps", "0"]) == 2
        assert warnings.showwarning is before
    assert said[0] == "mmdit: note: with profile diffusers the negative prompt is not read at guidance scale 1"
    assert re.match(r"mmdit: note: .*no-t5 has no T5 encoder", said[1])


def test_the_bar_is_for_terminals_and_not_for_the_quiet(tiny, here, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert tiny(RED) == 0
    assert "1/1" in capsys.readouterr().err
    assert tiny(RED, "--quiet") == 0
    assert capsys.readouterr().err == ""


# ---- help


def test_help_loads_no_torch_and_names_what_there_is():
    code = "import sys; from mmdit.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    for words in (["--help"], ["generate", "--help"], ["inspect", "--help"]):
        text = subprocess.check_output([sys.executable, "-c", code, *words], text=True)
        if words[0] == "generate":
            assert all(f"{title}:" in text for title in ("what to draw", "with which model", "how to draw"))
            for name in (*PROFILES, *PRESETS, *SOLVERS, *SCHEDULES):
                assert name in text
            assert usage.SAMPLERS.split(", ") == [*SOLVERS] and usage.SCHEDULES.split(", ") == [*SCHEDULES]
            flat = " ".join(text.split())
            diffusers = PROFILES["diffusers"]
            numbers = (diffusers.steps, f"{diffusers.guidance_scale:g}", diffusers.sampler, diffusers.text.t5_length)
            assert all(f"diffusers: {number})" in flat for number in numbers)


def test_examples_of_the_help_are_commands():
    commands = re.findall(r"^ {4}(mmdit .*)$", EXAMPLES.replace("\\\n", ""), re.MULTILINE)
    assert len(commands) == EXAMPLES.count("    mmdit ") == 9
    for command in commands:
        options = app.parser().parse_args(shlex.split(command)[1:])
        generate.check_usage(options)
        if options.preset is not None:
            assert options.preset in PRESETS
    assert max(map(len, EXAMPLES.splitlines())) <= 80
