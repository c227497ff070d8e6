import sys

from moss_jax.cli import main

sys.exit(main())
