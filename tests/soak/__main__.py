"""``python tests/soak``: works from a clone, and needs only that linmem is installed."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])      # so that this folder is the package `soak`

from soak.command import main  # noqa: E402

status = main()
sys.stdout.flush()
# After a finding a thread may still hang, and the interpreter's own end would wait for it.
os._exit(status) if status else sys.exit(0)
