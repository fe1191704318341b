"""Checkpoints that are whole, or known not to be."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .data.shards import write_whole


if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.get_logger(__name__)
# written last: the size of every other file of the checkpoint
SEAL = "files.json"


def seal(folder: Path) -> None:
    """Says that the checkpoint is whole, once all of it has reached the disk."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_whole(folder / SEAL, json.dumps(sizes) + "\n")


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint is sealed and its files are as large as they were then."""
    try:
        sizes = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def output_folder(args: "TrainingArguments", *sources: str | None) -> Path:
    """Where a run writes; ValueError if its arguments do not say, or if it would replace what it starts from."""
    if args.output_dir is None:
        raise ValueError("expected an output_dir, got none")
    output = Path(args.output_dir)
    for source in filter(None, sources):
        if Path(source).resolve().parent == output.resolve():
            raise ValueError(f"expected another output_dir than that of a model to start from, {source}, got {output}")
    return output


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint in `output`; a warning names each newer one that is not."""
    for folder in sorted(_checkpoints(output), key=_step, reverse=True):
        if is_whole(folder):
            return folder
        logger.warning(f"{folder} is not whole, as if its run was killed or the disk was full: it is left out")
    return None


def remove_broken(output: Path) -> None:
    """Removes the checkpoints that are not whole, so that none of them is kept in place of a whole one."""
    for folder in _checkpoints(output):
        if not is_whole(folder):
            shutil.rmtree(folder)


def _checkpoints(output: Path) -> list[Path]:
    return list(output.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"))


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
