# SPDX-License-Identifier: MIT
"""``python -m miniq``, and the command ``miniq``: the command line."""

from __future__ import annotations

import sys

from .cli import health

if health.is_asked(sys.argv[1:]):  # every few seconds: nothing else is loaded for it
    main = health.main
else:
    from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
