"""Everything that learns, measures or publishes."""

import os
import sys


# Beside another busy process, threads that spin while they wait for each other take its turn, and theirs. Read once,
# when torch is imported.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
