"""`python -m realign_fast` is the command `realign`."""

from .cli import main

raise SystemExit(main())
