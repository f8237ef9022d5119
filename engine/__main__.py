"""`python -m engine` is `dg-run`."""

import sys

from engine.cli import main

sys.exit(main())
