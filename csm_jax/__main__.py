"""`python -m csm_jax` is `csm-jax`."""

import sys

from csm_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
