"""Generated command lines: whatever is typed ends in an exit code and a message, never in a traceback."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzzing import SECONDS
from mmdit import Pipeline
from mmdit.cli import app
from mmdit.cli.app import main

FEWEST = 40
WORDS = (
    *(
        "a red ring",
        "",
        " ",
        "x.png",
        "a.txt",
        "-",
        "--",
        "-1",
        "0",
        "1",
        "7",
        "1e999",
        "nan",
        "inf",
        "1_0",
        "٣",
        "0x10",
    ),
    *("9" * 30, "9" * 5000, "-0", "1.5", "true", "None", "demo", "./demo", "/", "..", "~", "a/b", "a/b/c", "x" * 300),
    *("é☃", "\udc80", "a\0b", "a\nb", "%s", "{}", "$(x)", "*", "[", "euler", "karras", "fp16", "cuda:9", "meta", "gpu"),
    *("resolution", "turbo", "comfyui", "fp8", "single", "official", "rescale=x", "kind=apg momentum=-0.5", "PROMPTS"),
)


RIGHT = {
    ("generate",): ["a red ring"],
    ("inspect",): ["demo"],
    ("convert",): ["demo", "out", "--layout", "single"],
    ("quantize",): ["demo", "out"],
    ("verify",): ["demo"],
    ("compare",): ["a red ring"],
    ("completion",): ["bash"],
}


class PassedError(Exception):
    """A model would have been loaded: the command line passed all checks."""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder, where nothing is loaded, downloaded or measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PROMPTS").write_text("a\n")

    def stop(*_: object, **__: object) -> None:
        raise PassedError

    for name in ("load", "demo", "from_pretrained", "from_single_file"):
        monkeypatch.setattr(Pipeline, name, stop)
    for name in (
        *("mmdit.checkpoints.describe.describe", "mmdit.checkpoints.write.convert", "mmdit.parity.verify.verify"),
        *("mmdit.checkpoints.quantize.quantize_checkpoint", "mmdit.parity.reference.load_diffusers"),
        *("mmdit.bench.step.bench", "mmdit.bench.layers.layers", "mmdit.bench.picture.pictures"),
        *("mmdit.bench.step.work_of", "mmdit.bench.layers.shapes_of", "mmdit.cli.benches._note_long"),
        *("mmdit.bench.maps.cost", "mmdit.bench.fp8_quality.run", "mmdit.cli.benches.measure"),
        *("mmdit.bench.lora.steps", "mmdit.bench.lora.merges", "mmdit.bench.controlnet.steps"),
        *(
            "mmdit.bench.ways.ways",
            "mmdit.bench.errors.errors",
            "mmdit.bench.speed.speed",
            "mmdit.bench.training.bench",
        ),
        *(
            "mmdit.bench.memory.budgets",
            "mmdit.bench.host_memory.stages",
            "mmdit.bench.loading.loading",
            "mmdit.bench.loading.from_disk",
        ),
        *("mmdit.bench.parallel.bench", "mmdit.bench.links.links"),
    ):
        monkeypatch.setattr(name, stop)
    return tmp_path


def options() -> dict[tuple[str, ...], list[str]]:
    """All options, by command."""
    from mmdit.cli.completion import commands_of

    return {command.words: [*command.options, *command.commands] for command in commands_of(app.parser())}


def lines(table: dict[tuple[str, ...], list[str]]) -> Iterator[list[str]]:
    end, seed = time.monotonic() + SECONDS, 0
    while seed < FEWEST or time.monotonic() < end:
        draw = random.Random(seed)
        command = draw.choice(list(table))
        known = [option for option in table[command] if option not in ("-h", "--help", "--debug")] or ["--debugg"]
        more = [draw.choice((*known, *WORDS)) for _ in range(draw.randrange(4))]
        yield [*command, *draw.choice((RIGHT.get(command, []), draw.choices(WORDS, k=draw.randrange(3)))), *more]
        seed += 1


def test_any_command_line_ends_in_an_exit_code(here, capsys):
    table, codes = options(), set[int]()
    for line in lines(table):
        try:
            code = main(line)
        except SystemExit as stopped:
            code = stopped.code
        except PassedError:
            code = 0
        said = capsys.readouterr()
        assert code in (0, 1, 2), line
        assert "Traceback" not in said.err, line
        assert not code or said.err, line
        codes.add(code)
        assert {path.suffix for path in here.iterdir()} <= {""}, line
    assert codes >= {0, 2}
