"""``python -m linmem``."""

import sys

from linmem.cli import main

if __name__ == "__main__":
    sys.exit(main())
