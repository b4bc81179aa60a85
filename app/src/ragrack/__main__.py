import sys

from ragrack.cli import main

sys.exit(main())
