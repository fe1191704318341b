"""Where things are kept that take long to make or to fetch."""

import os
from pathlib import Path


# the default language model, converted
CACHE = Path(os.environ.get("FMRILM_CACHE", Path.home() / ".cache" / "fmrilm"))
