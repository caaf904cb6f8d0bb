"""Tests with Ray clusters of several nodes take minutes, so they run only where asked for: `DSE_WORKER_TESTS=1`."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("DSE_WORKER_TESTS") == "1" else ["test_*.py"]
