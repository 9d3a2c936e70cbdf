"""The command line: each command parses its arguments and calls the library."""

from mmdit.cli.app import main, run_process

__all__ = ["main", "run_process"]
