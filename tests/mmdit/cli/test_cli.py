"""The command line, as a user meets it."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmdit import Pipeline, calibrate, load_mmdit
from mmdit.cli.app import main
from mmdit.embedded import EMBEDDED
from quant.scaling import scale_of


def test_generate(tiny_folders, tmp_path, capsys):
    out = tmp_path / "new" / "cat.png"
    arguments = ["generate", "a red circle", "-m", str(tiny_folders["sd3-medium"]), "-o", str(out), "--steps", "2"]
    assert main([*arguments, "--height", "32", "--width", "48", "--seed", "7"]) == 0
    with Image.open(out) as picture:
        assert picture.size == (48, 32)
    assert str(out) in capsys.readouterr().out
    first = out.read_bytes()
    main([*arguments, "--height", "32", "--width", "48", "--seed", "7"])
    assert out.read_bytes() == first
    main([*arguments, "--height", "32", "--width", "48", "--seed", "8"])
    assert out.read_bytes() != first


def test_inspect_and_convert(tiny_folders, tmp_path, capsys):
    assert main(["inspect", str(tiny_folders["sd3.5-medium"])]) == 0
    assert "second attention in 2 blocks" in capsys.readouterr().out
    target = tmp_path / "all.safetensors"
    assert main(["convert", str(tiny_folders["sd3.5-medium"]), str(target), "--layout", "single"]) == 0
    assert target.is_file()
    assert main(["convert", str(target), str(target), "--layout", "single"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_verify(tiny_folders, capsys):
    assert main(["verify", str(tiny_folders["sd3-medium"]), "--steps", "2"]) == 0
    assert "velocity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["generate", "x", "-m", "nowhere"], 1, "does not exist"),
        (["generate", "x", "-m", "FOLDER", "--sampler", "eular"], 2, "did you mean 'euler'"),
        (["generate", "x", "-m", "FOLDER", "--height", "100"], 1, "multiple of 16"),
        (["generate", "x", "-m", "FOLDER", "--steps", "0"], 2, "at least 1"),
        (["generate", "x", "-m", "FOLDER", "--vae", "y"], 2, "--vae goes with a single file"),
        (["generate", "x", "-m", "FOLDER", "-o", "picture.jpg"], 2, "must end in .png"),
        (["generate", "x", "-m", "FOLDER", "--device", "cuda:99"], 2, "CUDA devices here"),
        (["generate", "x", "-m", "FOLDER", "--device", "gpu"], 2, "none that torch knows"),
        (["inspect", "nowhere"], 1, "does not exist"),
        (["inspect", "some/where"], 1, "hf download some/where"),
        (["convert", "FOLDER", "there", "--layout", "oficial"], 2, "did you mean 'official'"),
        (["verify", "FOLDER", "--steps", "0"], 2, "--steps must be"),
        (["compare", "x", "--sampler", "eular"], 2, "did you mean 'euler'"),
        (["compare", "x", "--profile-b", "comfy"], 2, "did you mean 'comfyui'"),
        (["bench", "--model", "huge"], 2, "known are large, medium, demo"),
        (["bench", "--repeats", "0"], 2, "--repeats must be"),
    ],
)
def test_errors_are_one_sentence_without_traceback(tiny_folders, tmp_path, monkeypatch, capsys, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    folder = str(tiny_folders["sd3-medium"])
    assert main([folder if word == "FOLDER" else word for word in arguments]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "\nmmdit: " in f"\n{error}"
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "x", "--prompt-file", "y"], "did you mean --profile or --prompts?"),
        (["train", "init", "run.json", "--dtta", "y"], "did you mean --data?"),
        (["compare", "x", "demo"], "unrecognized arguments: demo\n"),
        (["generate", "x", "--lora", "style.safetensors:strong"], "the weight 'strong' of style.safetensors is no num"),
    ],
)
def test_arguments_that_are_not_known(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style.safetensors").touch()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_folders_and_other_files_in_place_of_what_is_wanted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder, picture, empty = tmp_path / "folder", tmp_path / "a.png", tmp_path / "empty.safetensors"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(picture)
    save_file({}, empty)
    (tmp_path / "a.json").write_text('{"1": {"class_type": "SaveImage", "inputs": {}}}')
    (tmp_path / "beside.safetensors").write_bytes(b"broken")
    for arguments, *said in (
        (["generate", "x", "--image", "folder"], "folder is a folder"),
        (["generate", "x", "--lora", "folder"], "--lora folder", "folder is there"),
        (["generate", "x", "--settings", "empty.safetensors"], "empty.safetensors is not a PNG"),
        (["generate", "x", "-m", "a.png"], "a.png is a PNG picture, not safetensors"),
        (["generate", "x", "-m", "empty.safetensors"], "no transformer", "a file without tensors"),
        (["run", "a.json", "--output", "a.png"], "a.png", "is a file, expected a folder"),
        (["verify", "empty.safetensors"], "no transformer", "a file without tensors"),
        (["train", "init", "a.png", "--model", "demo", "--data", "folder"], "a.png: File exists; give another name"),
    ):
        assert main(arguments) == (2 if arguments[0] == "run" else 1)
        error = capsys.readouterr().err
        assert all(part in error for part in said), error
        assert "beside" not in error
        assert ".mmdit-" not in error


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["inspect", str(tmp_path / "nowhere"), "--debug"])


def test_wrong_usage_exits_with_two(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate"])
    assert stopped.value.code == 2
    assert "prompt" in capsys.readouterr().err


def test_python_dash_m_and_help_are_quick_and_named():
    out = subprocess.check_output([sys.executable, "-m", "mmdit", "--help"], text=True)
    for command in ("generate", "inspect", "convert", "verify"):
        assert command in out


def test_compare_says_where_profiles_differ_and_why(capsys):
    few = ["--steps", "1", "--guidance-scale", "2"]
    assert main(["compare", "a red star", *few]) == 0
    assert "stages agree within rounding" in capsys.readouterr().out
    assert main(["compare", "a red star", "--profile-b", "comfyui", "--json", *few]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["first"] == "prompt t5 tokens"
    assert "profile field text.t5_length: 256 in a, 77 in b" in found["explanation"]


def test_compare_with_diffusers_itself(tiny_folders, capsys):
    folder = str(tiny_folders["sd3.5-medium"])
    few = ["--model-a", folder, "--diffusers", "--steps", "1", "--height", "32", "--width", "32"]
    assert main(["compare", "a red star", *few]) == 0
    assert "b: diffusers StableDiffusion3Pipeline" in capsys.readouterr().out


def test_quantize_with_and_without_calibration(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue star on white\n")
    plain, static = tmp_path / "plain", tmp_path / "static"
    assert main(["quantize", str(EMBEDDED), str(plain)]) == 0
    few = ["--prompts", str(prompts), "--steps", "1", "--dtype", "float32", "--device", "cpu", "--quiet"]
    assert main(["quantize", str(EMBEDDED), str(static), "--recipe", "fp8-static", *few]) == 0
    said = capsys.readouterr().out
    assert "43 of 107 Linears in float8" in said
    assert "29 of 107 Linears in float8" in said
    weights = [load_mmdit(folder).joint_blocks[0].x_block.attn.qkv.weight for folder in (plain, static)]
    assert weights[0].input_scale is None
    seen = calibrate(Pipeline.demo(), ["a red circle", "a blue star on white"], 1, batch=1)
    assert weights[1].input_scale == scale_of(seen.amax()["joint_blocks.0.x_block.attn.qkv"], "e4m3")
    assert torch.equal(*(weight.qdata.view(torch.uint8) for weight in weights))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--recipe", "fp8-static"], 2, "--recipe fp8-static needs --prompts FILE"),
        (["--prompts", "PROMPTS"], 2, "fp8-tensor"),
        (["--recipe", "fp8-static", "--prompts", "EMPTY"], 1, "holds no prompt"),
        (["--recipe", "fp9"], 2, "unknown recipe 'fp9'; did you mean"),
    ],
    ids=str,
)
def test_what_quantize_refuses(tmp_path, capsys, arguments, code, says):
    files = {"PROMPTS": tmp_path / "prompts.txt", "EMPTY": tmp_path / "empty.txt"}
    files["PROMPTS"].write_text("a red circle\n")
    files["EMPTY"].write_text("\n")
    target = tmp_path / "out"
    command = ["quantize", str(EMBEDDED), str(target), *(str(files.get(word, word)) for word in arguments)]
    assert main(command) == code
    assert says in capsys.readouterr().err
    assert not target.exists()


def test_a_reader_that_stops_is_no_error():
    command = [sys.executable, "-m", "mmdit", "completion", "bash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 141
