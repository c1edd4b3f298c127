"""``python -m hdrops`` is the ``hdrops`` command."""

import sys

from hdrops.cli import main

sys.exit(main())
