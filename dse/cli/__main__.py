"""Entry point of `python -m dse.cli`, which is the same as `dse`."""

import sys

from dse.cli.main import main

sys.exit(main())
