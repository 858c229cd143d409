"""`python -m jax_dpo` is `jax-dpo`."""

from __future__ import annotations

import sys

from jax_dpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
