"""`python -m slimtune`, for launchers such as `torchrun -m slimtune train run.yaml`."""

import sys

from slimtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
