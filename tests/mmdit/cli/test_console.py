"""What is printed never ends a command: odd encodings, full and closed outputs, long names. Shells complete it."""

import errno
import io
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from full import FULL
from mmdit import PROFILES, ControlNet, ControlNetConfig, Hires, Pipeline, read_settings
from mmdit.cli import app, devices, drawing, process
from mmdit.cli.app import main
from mmdit.cli.completion import commands_of
from mmdit.cli.console import Stream
from mmdit.cli.long_runs import passes_of
from mmdit.cli.usage import dtype_name, sampler_name, schedule_name
from mmdit.embedded import EMBEDDED
from skips import SKIPS

FEW = ["--steps", "1", "--height", "16", "--width", "16", "--max-sequence-length", "32", "--device", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Full(io.StringIO):
    """A stream on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


# ---- stdout


def test_a_stream_keeps_its_first_error_and_escapes_what_it_cannot_encode():
    for encoding, wanted in (("ascii", b"a \\u2603 \\xe9"), ("cp1252", b"a \\u2603 \xe9"), ("utf-8", "a ☃ é".encode())):
        raw = io.BytesIO()
        stream = Stream(io.TextIOWrapper(raw, encoding=encoding))
        assert stream.write("a ☃ é") == 5
        stream.flush()
        assert raw.getvalue() == wanted
        assert stream.error is None
    full = Stream(Full())
    full.write("x")
    full.flush()
    assert isinstance(full.error, OSError) and full.error.errno == errno.ENOSPC
    closed = io.StringIO()
    closed.close()
    stream = Stream(closed)
    stream.write("x")
    assert isinstance(stream.error, ValueError) and not stream.isatty()
    nowhere = Stream(None)
    assert nowhere.write("x") == 1 and nowhere.error is None and not nowhere.isatty()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_names_that_stdout_cannot_encode_stop_nothing(here, monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert main(["generate", "a red ring", "--seed", "1", "2", "-o", "雪/雪é.png", *FEW]) == 0
    assert len(list(Path("雪").iterdir())) == 2
    assert raw.getvalue().count(b"\\u96ea") == 4


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError()])
def test_a_stdout_that_fails_stops_no_drawing(here, capsys, monkeypatch, error):
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "write", lambda text: (_ for _ in ()).throw(error))
    monkeypatch.setattr(sys, "stdout", stdout)
    code = 141 if isinstance(error, BrokenPipeError) else 1
    assert main(["generate", "a red ring", "--seed", "1", "2", "-o", "x.png", *FEW]) == code
    assert {path.name for path in here.iterdir()} == {"x-0.png", "x-1.png"}
    assert ("No space left" in capsys.readouterr().err) == (code == 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason=SKIPS["full disk"])
def test_a_full_stdout_in_a_process_of_its_own(here):
    command = [sys.executable, "-m", "mmdit", "completion", "bash"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("mmdit: the output could not be written to stdout: ") and "Traceback" not in done.stderr
    )
    closed = subprocess.run([*command, "--debug"], preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, check=False)
    assert (closed.returncode, closed.stderr) == (0, b"")


ENDING = """
import atexit, runpy, sys
from types import SimpleNamespace
class Freed:
    def __del__(self):
        print("freed")
atexit._clear()  # of what an environment registers when Python starts
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: False))
kept, file = Freed(), open("of_the_caller", "w")
file.write("said")
sys.argv = ["mmdit", *sys.argv[1:]]
runpy.run_module("mmdit")
"""


@pytest.mark.parametrize(("words", "code"), [(["completion", "bash"], 0), (["workflow", "nothing"], 1)])
def test_a_process_ends_as_python_ends(here, words, code):
    """What a caller has written is kept, and what it made is freed, by a command that has imported torch."""
    done = subprocess.run([sys.executable, "-c", ENDING, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (code, ["freed"])
    assert Path("of_the_caller").read_text() == "said"


# ---- names and places


def test_long_names_are_drawn_or_refused_before_drawing(here, capsys, monkeypatch):
    longest = "x" * 251 + ".png"
    assert main(["generate", "a red ring", "-o", longest, *FEW]) == 0
    assert [path.name for path in here.iterdir()] == [longest]
    monkeypatch.setattr(drawing, "load", lambda *_, **__: pytest.fail("loaded"))
    for words in (["-o", f"x{longest}"], ["-o", longest, "--seed", "1", "2"], ["-o", f"{'d' * 300}/x.png"]):
        assert main(["generate", "a red ring", *words, *FEW]) == 2
        assert "names have at most 255" in capsys.readouterr().err
    assert main(["generate", "a red ring", "-o", "d/" * 2100 + "x.png", *FEW]) == 2
    assert "bytes is too long" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == [longest]


def test_errors_of_the_disk_name_the_file(here, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("mmdit.cli.outputs.save_png", fail)
    for number in (errno.ENOSPC, errno.EFBIG, errno.EIO):
        for words in (["-o", "x.png"], []) if FULL or number == errno.ENOSPC else ([],):
            assert main(["generate", "a red ring", *words, *FEW]) == 1
            name = "x.png" if words else "picture.png"
            assert capsys.readouterr().err.endswith(f"mmdit: {name}: {os.strerror(number)}\n")
    assert list(here.iterdir()) == []
    Path("file").touch()
    assert main(["convert", str(EMBEDDED), "file/x", "--layout", "official"]) == 1
    assert "file" in capsys.readouterr().err


def test_a_model_with_too_long_a_name_is_an_error(here, capsys):
    assert main(["generate", "x", "-m", "m" * 300]) == 1
    assert capsys.readouterr().err.startswith("mmdit: mmm")


# ---- what is meant


def test_names_from_elsewhere():
    same = {"DPM++ 2M": "dpmpp_2m", "Euler a": "euler_ancestral", "dpm++ 2m sde": "dpmpp_2m_sde", "UniPC": "uni_pc"}
    same |= {"DPM2 a": "dpm_2_ancestral", "DPM++ 2S a": "dpmpp_2s_ancestral", "Heun": "heun", "LCM": "lcm"}
    same |= {"FlowMatchEulerDiscreteScheduler": "euler", "eular": "eular", "dpmpp-2m": "dpmpp_2m"}
    assert {name: sampler_name(name) for name in same} == same
    assert [schedule_name(name) for name in ("Karras", "SGM Uniform", "x")] == ["karras", "sgm_uniform", "x"]
    assert [dtype_name(name) for name in ("fp16", "BF16", "torch.float32", "int8")] == [
        "float16",
        "bfloat16",
        "float32",
        "int8",
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a.png", "b.png"], "--settings PICTURE.png"),
        (["--settings", "a.png", "b.png"], "--settings takes one picture, a.png"),
        (["prompts.txt"], "--prompts FILE"),
        (["sd3.5_large.safetensors"], "-m MODEL"),
        (["my prompts.txt"], "--prompts FILE"),
        (["x", "-n", "no.txt"], "--prompts FILE"),
        (["x", "--sampler", "DPM++ 2M Karras"], "--sampler dpmpp_2m --schedule karras"),
    ],
)
def test_files_that_are_given_as_prompts(here, capsys, words, says):
    Path("my prompts.txt").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *words])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_words_that_only_look_like_files_are_drawn(here, capsys):
    Path("ring").write_text("a file without an ending")
    assert main(["generate", "a poster that says cat.png", "ring", *FEW]) == 0
    assert "'ring' is drawn as words" in capsys.readouterr().err


def test_aliases_reach_the_drawing(here):
    words = ["--cfg", "2", "--dtype", "fp64", "--sampler", "DPM++ 2M", "--schedule", "Karras"]
    assert main(["generate", "a red ring", *words, *FEW, "--steps", "2"]) == 0
    found = read_settings("picture.png")
    wanted = {"guidance_scale": 2.0, "dtype": "float64", "sampler": "dpmpp_2m", "schedule": "karras"}
    assert {name: found[name] for name in wanted} == wanted


def test_comments_in_files_of_prompts(here, capsys):
    Path("lines.txt").write_text("# shapes\na red ring\n\n  # more\na blue star\n")
    assert main(["generate", "--prompts", "lines.txt", "-o", "x.png", *FEW]) == 0
    assert [read_settings(f"x-{i}.png")["prompt"] for i in range(2)] == ["a red ring", "a blue star"]
    said = capsys.readouterr()
    assert "comments: 2" in said.err and "picture 2 of 2" in said.out
    Path("lines.txt").write_text("# nothing else\n")
    assert main(["generate", "--prompts", "lines.txt"]) == 1
    assert main(["generate", "--prompts", str(here)]) == 1
    assert f"--prompts {here} cannot be read" in capsys.readouterr().err


def test_a_folder_that_is_named_like_a_file(tiny_folders, here):
    shutil.copytree(tiny_folders["sd3-medium"], "model.safetensors")
    assert main(["generate", "a red ring", "-m", "model.safetensors", *FEW]) == 0
    words = ["--model-a", "model.safetensors", "--steps", "1", "--height", "16", "--width", "16", "--device-a", "cpu"]
    assert main(["compare", "a red ring", *words, "--device-b", "cpu"]) == 0


def test_the_embedded_model_is_demo_everywhere(here, capsys):
    assert main(["inspect", "demo"]) == 0
    assert main(["convert", "demo", "copy.safetensors", "--layout", "single"]) == 0
    assert main(["quantize", "demo", "quantized", "--quiet"]) == 0
    few = ["--steps", "1", "--height", "16", "--width", "16", "--device-a", "cpu", "--device-b", "cpu"]
    assert main(["compare", "a red ring", "--model-a", "demo", "--diffusers", *few]) == 0
    assert "b: diffusers" in capsys.readouterr().out


def test_diffusers_reads_every_layout(tiny_folders, here, capsys):
    assert main(["convert", str(tiny_folders["sd3.5-medium"]), "official", "--layout", "official"]) == 0
    few = ["--steps", "1", "--height", "32", "--width", "32", "--device-a", "cpu", "--device-b", "cpu"]
    assert main(["compare", "a red star", "--model-a", "official", "--diffusers", *few]) == 0
    assert "b: diffusers" in capsys.readouterr().out


# ---- long runs and threads


def test_long_runs_are_announced(here, capsys, monkeypatch):
    monkeypatch.setattr("mmdit.cli.long_runs._SMALL", 0)
    for flops, said in ((1e15, False), (1e6, True)):
        monkeypatch.setattr("mmdit.cli.long_runs._flops_per_second", lambda dtype, flops=flops: flops)
        assert main(["generate", "a red ring", *FEW]) == 0
        assert ("judged by the speed of one matrix product" in capsys.readouterr().err) == said


def test_what_a_long_run_consists_of():
    pipe = Pipeline.demo(profile="comfyui")
    ask = Namespace(height=64, width=64, steps=10, guidance_scale=None, sampler="heun", schedule=None)
    net = ControlNet(ControlNetConfig(2, 256, 192))
    windows = {"control_guidance_start": [0.25], "control_guidance_end": [0.75]}
    arguments = {"controlnet": [net], **windows, "hires": Hires(scale=2.0, strength=0.5, steps=6)}
    assert [*passes_of(pipe, ask, {})] == [(10, 20, 64, 2, 1.0)]
    assert [*passes_of(pipe, ask, arguments)] == [(10, 20, 64, 2, 1.25), (6, 12, 128, 2, 1.25)]
    ask.guidance_scale = 1.0
    assert next(passes_of(pipe, ask, {})).branches == 1
    ask.sampler = "euler_cfg_pp"
    assert next(passes_of(pipe, ask, {})).branches == 2
    ask.sampler, pipe.profile = "euler", PROFILES["diffusers"]
    assert next(passes_of(pipe, ask, {"image": "a.png", "strength": 0.3})).steps == 3
    ask.guidance_scale = 0.5  # below 1, diffusers' pipeline runs no unconditional branch
    assert next(passes_of(pipe, ask, {})).branches == 1


def test_threads_are_chosen_for_the_embedded_model(monkeypatch):
    asked, cpu = [], torch.device("cpu")
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    devices.choose_threads(None, None, cpu)
    devices.choose_threads(None, "demo", cpu)
    assert asked == [2, 2]
    devices.choose_threads(None, "folder", cpu)
    devices.choose_threads(None, None, torch.device("meta"))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    devices.choose_threads(None, None, cpu)
    assert asked == [2, 2]
    devices.choose_threads(5, "folder", cpu)
    assert asked == [2, 2, 5]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    devices.choose_threads(None, None, cpu)
    assert asked == [2, 2, 5, 1]


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_only_the_command_that_is_called_gets_its_options(command):
    every, one = ({each.words: each for each in commands_of(app.parser(name))} for name in (None, command))
    assert {*one} == {words for words in every if words[:1] == (command,) or len(words) < 2}
    assert one[command,] == every[command,]
    others = [each for words, each in one.items() if words and words[0] != command]
    assert {option for each in others for option in each.options} == {"-h", "--help", "--debug"}


def test_a_process_is_prepared_for_small_steps_before_torch_is_imported(monkeypatch):
    said: list[tuple[int, int]] = []
    glibc = SimpleNamespace(mallopt=lambda *pair: said.append(pair))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: glibc)
    monkeypatch.setattr(process.sys, "platform", "linux")
    for name in [*os.environ]:
        if name.startswith(("MALLOC_", "GOMP_", "OMP_WAIT")):
            monkeypatch.delenv(name)
    spins, trim, mmap = "GOMP_SPINCOUNT", (-1, 256 * 2**20), (-3, 32 * 2**20)
    with process.small_steps(None):  # torch is here
        assert (spins not in os.environ) and not said
    monkeypatch.delitem(sys.modules, "torch")
    with process.small_steps("folder"):
        assert (spins not in os.environ) and not said
    with process.small_steps("demo"):
        assert (os.environ[spins], said) == ("1000", [trim, mmap])
    assert spins not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with process.small_steps(None):
        assert (spins not in os.environ) and said == [trim, mmap]
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: SimpleNamespace())  # musl has no mallopt
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    with process.small_steps(None):
        assert said == [trim, mmap]


# ---- completion


def test_scripts_name_every_command_and_option(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        text = capsys.readouterr().out
        for command in app.COMMANDS:
            assert command.__name__.rpartition(".")[2] in text
        assert ("guidance-scale" in text) and "float16" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason=SKIPS["bash"])
def test_bash_completes(here, capsys):
    main(["completion", "bash"])
    Path("complete.sh").write_text(capsys.readouterr().out)
    cases = {
        ("gen",): "generate",
        ("bench", "la"): "layers",
        ("bench", "layers", "--mod"): "--model",
        ("generate", "a cat", "--dtype", "bfl"): "bfloat16",
        ("compare", "--diff"): "--diffusers",
    }
    for words, wanted in cases.items():
        line = 'source ./complete.sh; COMP_WORDS=(mmdit "${@}"); COMP_CWORD=$#; _mmdit; echo "${COMPREPLY[@]}"'
        found = subprocess.check_output(["bash", "-c", line, "bash", *words], text=True).split()
        assert found == [wanted]


# ---- device and dtype by themselves


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "on the CPU in float32"),
        (["--device", "auto", "--dtype", "float64"], "on the CPU in float64"),
        (["--device", "cpu", "--dtype", "float32"], None),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason=SKIPS["no gpu"])
def test_what_was_not_asked_for_is_said_in_one_line(here, capsys, given, said):
    few = [one for one in FEW if one not in ("--device", "cpu")]
    assert main(["generate", "a red circle", "--output", "a.png", *few, *given]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "computing" in line]
    assert len(lines) == (said is not None)
    assert said is None or lines[0].endswith(said)
