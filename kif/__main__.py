"""`python -m kif` is the command `kif`, for launchers such as `torchrun -m kif train`."""

import sys

from kif.cli import main

if __name__ == "__main__":
    sys.exit(main())
