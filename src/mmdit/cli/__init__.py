"""The command line: arguments become calls."""

from mmdit.cli.app import main

__all__ = ["main"]
