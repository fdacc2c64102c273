"""``python -m seqcompress``."""

from __future__ import annotations

import sys

from seqcompress.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m seqcompress"))
