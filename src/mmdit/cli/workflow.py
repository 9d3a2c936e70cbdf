"""`mmdit workflow`: describe a ComfyUI workflow, and the files that it needs."""

from __future__ import annotations

import argparse

from mmdit.cli.console import say


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the workflow, and the folders in which its files are searched."""
    parser.add_argument("workflow", metavar="FILE", help="workflow in API or UI form (.json), or a PNG that holds one")
    models = "ComfyUI's folder or its models folder, to say which files are missing (default: only what is wanted)"
    parser.add_argument("--models", nargs="+", metavar="FOLDER", help=models)
    parser.add_argument("--input", metavar="FOLDER", help="where LoadImage reads")


def run(options: argparse.Namespace) -> int:
    """Print the outline."""
    from mmdit.comfyui.files import as_folders
    from mmdit.comfyui.outline import outline

    folders = None if options.models is None else as_folders(options.models, options.input, None)
    say(outline(options.workflow, folders))
    return 0
