"""Convert a CSM checkpoint: `python convert_weights.py SRC DST --to LAYOUT`; see `--help`."""

import argparse
import sys

from csm_jax.weights import cli


def main() -> int:
    """Returns the exit code of the conversion given on the command line."""
    parser = argparse.ArgumentParser(prog="convert_weights.py", description=cli.DESCRIPTION)
    cli.add_arguments(parser)
    return cli.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
