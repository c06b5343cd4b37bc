"""``python -m foretoken``."""

from __future__ import annotations

import sys

from foretoken.cli import main

sys.exit(main())
