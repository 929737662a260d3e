"""`python -m pmd`: hands over to cli.main."""

import sys

from pmd.cli import main

if __name__ == "__main__":
    sys.exit(main())
