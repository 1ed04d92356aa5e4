"""python3 -m tray."""

import sys

from tray.llmq_tray import main

sys.exit(main())
