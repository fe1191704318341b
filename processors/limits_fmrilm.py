"""How much a file from outside may hold, asked before anything of it is kept in memory."""

import zipfile
from pathlib import Path


# a cell of text becomes an object of several times its size; ten hours of 1000 ROIs take a tenth of this
MAX_TEXT_BYTES = 2**28
# both hemispheres and a volume of half a millimetre take a third of this
MAX_ARCHIVE_BYTES = 2**30


def check_text_size(path: Path) -> None:
    """ValueError for a table or JSON file that is larger than any that is meant."""
    if (size := path.stat().st_size) > MAX_TEXT_BYTES:
        raise ValueError(f"{path.name}: expected a text file of at most {MAX_TEXT_BYTES} bytes, got {size}")


def check_archive_size(path: str | Path) -> None:
    """ValueError for an .npz file that would inflate to more than any that is meant."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_ARCHIVE_BYTES:
        raise ValueError(f"expected arrays of at most {MAX_ARCHIVE_BYTES} bytes, got {size}")
