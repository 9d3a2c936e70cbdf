"""The command line: each command parses its arguments and calls the library."""

from mmdit.cli.app import main

__all__ = ["main"]
