"""``python -m hdrops`` is the ``hdrops`` command without the commands of the systems (``hdrops.models.cli``)."""

import sys

from hdrops.cli import main

sys.exit(main())
