"""``python -m seqcompress.gradients``."""

from __future__ import annotations

import sys

from seqcompress.gradients.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m seqcompress.gradients"))
