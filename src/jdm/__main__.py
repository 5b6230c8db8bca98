"""python -m jdm"""

import sys

from jdm.cli.parser import main

sys.exit(main())
