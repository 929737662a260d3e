"""`python -m pmd`."""

import sys

from pmd.cli import main

if __name__ == "__main__":
    sys.exit(main())
