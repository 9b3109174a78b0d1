"""`python -m jaxquant` is `jaxquant`."""

import sys

from jaxquant.cli import main

sys.exit(main())
