"""``python -m layernorm`` is the ``layernorm`` command; so is ``torchrun -m layernorm``."""

import sys

from layernorm.cli import main

if __name__ == "__main__":
    sys.exit(main())
