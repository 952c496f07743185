"""``python -m blindsight``."""

import sys

from blindsight.cli import main

sys.exit(main())
