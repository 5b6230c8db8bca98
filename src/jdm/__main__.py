"""python -m jdm"""

import sys

from jdm.cli import main

sys.exit(main())
