"""`python -m mmdit`."""

from mmdit.cli.app import command

raise SystemExit(command())
