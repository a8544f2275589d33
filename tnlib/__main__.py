"""`python -m tnlib` is the command `tnlib`, also where no such script is on the path."""

import sys

from tnlib.cli import main

sys.exit(main())
