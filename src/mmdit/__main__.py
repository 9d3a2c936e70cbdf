"""`python -m mmdit`."""

from mmdit.cli import main

raise SystemExit(main())
