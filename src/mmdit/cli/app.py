"""The command line: `mmdit generate | run | workflow | inspect | verify | quantize | convert | merge | train ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from types import ModuleType

from mmdit._version import __version__
from mmdit.cli import (
    bench,
    compare,
    completion,
    convert,
    generate,
    inspect,
    merge,
    quantize,
    run,
    train,
    verify,
    workflow,
)
from mmdit.cli.console import Stream, note_of, streams, warnings_shown_by
from mmdit.cli.usage import UsageError

# Errors that users can act on. Any other exception is our bug and shows its traceback.
USER_ERRORS = (ValueError, OSError, MemoryError, ImportError, FloatingPointError)
# Each command is a module with add_options(parser) and run(options), which returns the exit code.
COMMANDS: dict[ModuleType, str] = {
    generate: "draw pictures of prompts",
    run: "run a ComfyUI workflow",
    workflow: "show what a ComfyUI workflow does, and which files it needs",
    inspect: "describe a checkpoint, or show how a picture was drawn",
    convert: "write a checkpoint in another layout",
    merge: "write a checkpoint with LoRAs merged into its weights",
    train: "train a LoRA, the transformer or a ControlNet",
    quantize: "write a checkpoint in float8 that loads here and in ComfyUI",
    verify: "compare this library with diffusers on your weights, stage by stage",
    compare: "find the first stage at which two pipelines differ, and why",
    bench: "measure speed, memory and quality, also against diffusers and torchao",
    completion: "print a script for the shell that completes commands and options",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    The exit code is 0 after success, 1 after an error, 2 for wrong usage, 130 after Ctrl-C, and 141 where the reader of
    stdout has gone (`| head`). Printing never ends a command: characters that stdout cannot encode are written as
    escapes, and a stdout that is full or closed is reported at the end.
    """
    with streams() as out:
        code = _run(arguments)
        out.flush()
        return code or _code_of(out)


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unknown = parser(arguments[0] if arguments else "").parse_known_args(arguments)
    if unknown:
        options.own_parser.error(f"unrecognized arguments: {' '.join(unknown)}{_nearest(options.own_parser, unknown)}")
    try:
        with warnings_shown_by(note_of(options)):
            return int(options.run(options))
    except (*USER_ERRORS, RuntimeError) as error:
        if options.debug or not _is_for_users(error):
            raise
        print(f"mmdit: {_said(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("mmdit: stopped", file=sys.stderr)
        return 130


def _nearest(own: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """Which options of a command, or of its own commands, an unknown one may mean."""
    known, parsers = set[str](), [own]
    while parsers:
        for action in parsers.pop()._actions:
            known |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    option = next((one.partition("=")[0] for one in unknown if one.startswith("-")), "")
    near = get_close_matches(option, sorted(known), n=2)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _code_of(out: Stream) -> int:
    """The exit code of a command that has finished: not 0 where its output was lost."""
    if out.error is None:
        return 0
    if isinstance(out.error, BrokenPipeError):
        return 141
    print(f"mmdit: the output could not be written to stdout: {_said(out.error)}", file=sys.stderr)
    return 1


def _said(error: Exception) -> str:
    """The message of an error; messages of the operating system begin with the file's name."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        if isinstance(error, IsADirectoryError):
            return f"{error.filename} is a folder, and a file is expected"
        if isinstance(error, FileExistsError):
            return f"{error.filename}: {error.strerror}; give another name, or remove it first"
        other = f" -> {error.filename2}" if error.filename2 is not None else ""
        return f"{error.filename}{other}: {error.strerror}"
    return str(error)


def _is_for_users(error: Exception) -> bool:
    """Whether users can act on an error; `HubError` is a RuntimeError and is looked up separately."""
    if isinstance(error, USER_ERRORS):
        return True
    from mmdit.checkpoints.hub import HubError

    return isinstance(error, HubError)


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; it needs no torch.

    Args:
        command: the one command whose options are added, which saves the time of the others'; None adds those of all,
            as "completion" does, which prints them.
    """
    top = argparse.ArgumentParser(
        prog="mmdit",
        description="Stable Diffusion 3 / 3.5 for research.",
        epilog='Begin with: mmdit generate "a large red circle above a blue star". Each command has its own --help.',
    )
    top.add_argument("--version", action="version", version=f"mmdit-lab {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module, said in COMMANDS.items():
        words = f"{said[0].upper()}{said[1:]}."
        layout = getattr(module, "LAYOUT", {})
        name = module.__name__.rpartition(".")[2]
        one = commands.add_parser(name, parents=[common], help=said, description=words, **layout)
        one.set_defaults(run=module.run, parser=top, own_parser=one)
        if command in (None, name, "completion"):
            module.add_options(one)
    return top
