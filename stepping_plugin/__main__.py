"""``python -m stepping_plugin`` is the command ``stepping``."""

import sys

from stepping_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
