"""`python -m ttq_jax` is `ttq`."""

import sys

from ttq_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
