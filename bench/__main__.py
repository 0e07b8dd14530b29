"""``python -m linmem.bench``."""

import argparse
import sys

from linmem.bench.command import add_arguments, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m linmem.bench", description="Measure linmem.")
    add_arguments(parser)
    sys.exit(main(parser.parse_args()))
