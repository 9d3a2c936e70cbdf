"""The command line: each command parses its arguments and calls the library."""

from mmdit.cli.app import command, main

__all__ = ["command", "main"]
