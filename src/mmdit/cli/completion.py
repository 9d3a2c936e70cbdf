"""`mmdit completion`: a script that completes commands, options and their values in bash, zsh or fish."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from mmdit.cli.console import say

_HOW = """examples:
  bash:  mmdit completion bash > ~/.local/share/bash-completion/completions/mmdit
  zsh:   mmdit completion zsh >> ~/.zshrc
  fish:  mmdit completion fish > ~/.config/fish/completions/mmdit.fish"""
LAYOUT = {"epilog": _HOW, "formatter_class": argparse.RawDescriptionHelpFormatter}


class Command(NamedTuple):
    """A command with its options, their choices, and its subcommands."""

    words: tuple[str, ...]  # ("bench", "layers")
    options: dict[str, tuple[str, ...]]  # the choices of each option; () where a file or a number follows
    commands: tuple[str, ...]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the name of the shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to write the script for")


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    commands = list(commands_of(options.parser))
    say(_fish(commands) if options.shell == "fish" else _bash(commands, zsh=options.shell == "zsh"))
    return 0


def commands_of(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[Command]:
    """The command of a parser, and those of all its subparsers."""
    options: dict[str, tuple[str, ...]] = {}
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
        for option in action.option_strings:
            options[option] = tuple(map(str, action.choices or ()))
    yield Command(words, options, tuple(below))
    for name, one in below.items():
        yield from commands_of(one, (*words, name))


def _bash(commands: list[Command], *, zsh: bool) -> str:
    """A completion function for bash, which zsh runs through its bash compatibility."""
    cases = []
    for command in reversed(commands):  # the longest first
        words = " ".join((*command.commands, *command.options))
        values = [
            f'        "{option}") COMPREPLY=($(compgen -W {shlex.quote(" ".join(values))} -- "$word")); return;;'
            for option, values in command.options.items()
            if values
        ]
        chosen = ["      case $before in", *values, "      esac"] if values else []
        reply = f'      COMPREPLY=($(compgen -W {shlex.quote(words)} -- "$word"));;'
        cases += [f'    "{" ".join(("", *command.words))}"*)', *chosen, reply]
    lines = [
        *(["autoload -U +X bashcompinit && bashcompinit"] if zsh else []),
        "_mmdit() {",
        "  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} line",
        '  line=" ${COMP_WORDS[*]:1:COMP_CWORD-1}"',
        "  COMPREPLY=()",
        '  case "$line" in',
        *cases,
        "  esac",
        '  [[ $word == -* || ${#COMPREPLY[@]} -gt 0 ]] || COMPREPLY=($(compgen -f -- "$word"))',
        "}",
        "complete -o filenames -F _mmdit mmdit",
    ]
    return "\n".join(lines)


def _fish(commands: list[Command]) -> str:
    lines = []
    for command in commands:
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.words)
        where = seen or "__fish_use_subcommand"
        lines += [f"complete -c mmdit -n {shlex.quote(where)} -f -a {name}" for name in command.commands]
        for option, values in command.options.items():
            spelled = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            given = f" -x -a {shlex.quote(' '.join(values))}" if values else ""
            lines.append(f"complete -c mmdit -n {shlex.quote(where)} {spelled}{given}")
    return "\n".join(lines)
