"""``python tests/newcomer``: works from a clone, and needs no installed linmem."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])      # so that this folder is the package `newcomer`

from newcomer.command import main  # noqa: E402

sys.exit(main())
