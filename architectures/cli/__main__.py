"""``python -m trifuse.architectures.cli`` is the ``trifuse`` command, alone or under torchrun."""

import sys

from .main import main

sys.exit(main())
