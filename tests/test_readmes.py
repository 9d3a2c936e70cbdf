"""The snippets of all READMEs work as they stand: Python blocks run, and command lines are what the parser takes."""

import re
import shlex
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest

from check_links import broken
from mmdit import PROFILES
from mmdit.cli import generate
from mmdit.cli.app import parser

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted((ROOT / "src").glob("**/README.md"))]
# What a test changes in a snippet: fewer steps and pixels, so that it is quick, and places that only its reader has.
SUBSTITUTIONS = {
    r"num_inference_steps=\d+": "num_inference_steps=2",
    r"\bsigmas\(28\)": "sigmas(4)",
    r"\b128\b": "64",  # the sides of a picture
    r'device="cuda"': 'device="cpu"',
}
ELSEWHERE = re.compile(r"\bFOLDER\b|from_pretrained\(|from_single_file\(|load_lora\(|\bfolder\b")  # needs weights


def fenced(text: str, *languages: str) -> list[str]:
    """The contents of the fenced blocks of these languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in blocks if language in languages]


def commands(text: str) -> list[str]:
    """The command lines of `mmdit` in fenced and indented blocks."""
    indented = re.findall(
        r"^    (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    lines = "\n".join([*fenced(text, "", "console", "sh", "bash"), *indented]).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if re.match(r"\s*(\$ )?mmdit ", line)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


WITH_PYTHON = [path for path in READMES if fenced(path.read_text(), "python") and path.parent.name != "inspection"]


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name_of)  # that of inspection runs in its own test_readme.py
def test_python_blocks_run(path, tmp_path, monkeypatch, small_pictures, few_tokens):
    """All blocks of a file in one namespace, in their order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setitem(PROFILES, "diffusers", replace(PROFILES["diffusers"], steps=2))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(fenced(path.read_text(), "python")):
        if ELSEWHERE.search(re.sub(r"#.*", "", block)):
            compile(block, f"{path.name}, block {number}", "exec")
            continue
        code = reduce(lambda code, pair: re.sub(*pair, code), SUBSTITUTIONS.items(), block)
        exec(compile(code, f"{path.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("path", [path for path in READMES if commands(path.read_text())], ids=name_of)
def test_command_lines_are_taken(path):
    for line in commands(path.read_text()):
        try:
            options = parser().parse_args(shlex.split(line, comments=True)[1:])
            if options.run is generate.run:
                generate.check_usage(options)
        except SystemExit as stopped:
            assert stopped.code == 0, f"{name_of(path)}: {line}"


@pytest.mark.parametrize("path", READMES, ids=name_of)
def test_command_lines_in_sentences_are_taken(path):
    """Those without dots in place of words; of a command without arguments, that there is one."""
    take = parser().parse_args
    for line in re.findall(r"`(mmdit [^`]+)`", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)):
        words = shlex.split(" ".join(line.split()), comments=True)[1:]
        try:
            if "..." not in words:
                take(words if len(words) > 2 or "-" in line else [*words, "--help"])
        except SystemExit as stopped:
            assert stopped.code == 0, line


@pytest.mark.parametrize("path", READMES[1:], ids=name_of)
def test_every_file_of_a_package_is_named(path):
    named = set(re.findall(r"(?<![\w/.])\w+\.py\b", path.read_text()))
    assert {one.name for one in path.parent.glob("*.py")} - {"__init__.py", "__main__.py"} <= named


def test_all_links_hold():
    assert list(broken()) == []


def test_snippets_are_found():
    text = "```python\na = 1\n```\n\n```\nmmdit inspect x\n$ mmdit verify \\\n  y  # z\n```\n\n    mmdit bench --eager"
    assert fenced(text, "python") == ["a = 1\n"]
    assert commands(text) == ["mmdit inspect x", "mmdit verify    y  # z", "mmdit bench --eager"]
    assert len(READMES) > 3 and fenced(READMES[0].read_text(), "python") and commands(READMES[0].read_text())
