"""`python -m mmdit`."""

from mmdit.cli.app import main

raise SystemExit(main())
