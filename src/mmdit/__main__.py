"""`python -m mmdit`."""

from mmdit.cli.app import run_process

run_process()
