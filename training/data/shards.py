"""Parquet shards that are whole or not there at all, the ledger of what they hold, and the atlases of their scans."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features

from fmrilm.processors import Atlas
from fmrilm.processors.atlases_fmrilm import Parcels


LEDGER = "ledger.jsonl"
ATLASES = "atlases"
# columns of arrays
LARGE = ("signal", "censored", "descriptors")


class ShardStore:
    """
    Parquet shards in a folder per atlas, and a ledger: its first line holds the settings, each other one a shard and
    the keys of its rows. A shard without a line, left by a run that was killed, does not count and is removed.

    Args:
        settings: what was done to all scans; a folder made with others is refused.
        wanted: keys of the rows to keep; all others are dropped, `dropped` of them.
    """

    def __init__(self, output: Path, settings: dict[str, Any], wanted: set[str]) -> None:
        self.output = output
        self.shards = self._read_ledger(settings)
        self.dropped = len(self.keys - wanted)
        for shard, keys in list(self.shards.items()):
            keep = [key in wanted for key in keys]
            if not all(keep):
                del self.shards[shard]
                if any(keep):
                    rows = pq.read_table(output / shard).filter(pa.array(keep))
                    kept = [key for key in keys if key in wanted]
                    self.shards[self._write_shard(Path(shard).parent.name, rows)] = kept
        lines = [{"settings": settings}, *({"shard": shard, "keys": keys} for shard, keys in self.shards.items())]
        write_whole(output / LEDGER, "".join(json.dumps(line) + "\n" for line in lines))
        for path in [*output.glob("*/part-*.parquet"), *output.glob("*/.*.tmp"), *output.glob(".*.tmp")]:
            if path.relative_to(output).as_posix() not in self.shards:
                path.unlink()

    @property
    def keys(self) -> set[str]:
        """Keys of all rows."""
        return {key for keys in self.shards.values() for key in keys}

    def add(self, folder: str, rows: Sequence[tuple[str, dict[str, Any]]], features: Features) -> None:
        """Write a shard of (key, row), then its line in the ledger."""
        shard = self._write_shard(folder, Dataset.from_list([row for _, row in rows], features=features).data.table)
        self.shards[shard] = [key for key, _ in rows]
        with open(self.output / LEDGER, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"shard": shard, "keys": self.shards[shard]}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def _write_shard(self, folder: str, rows: pa.Table) -> str:
        numbers = [int(path.stem.split("-")[1]) for path in (self.output / folder).glob("part-*.parquet")]
        shard = f"{folder}/part-{max(numbers, default=-1) + 1:05d}.parquet"
        write_whole(self.output / shard, lambda path: pq.write_table(rows, path, write_page_checksum=True))
        return shard

    def _read_ledger(self, settings: dict[str, Any]) -> dict[str, list[str]]:
        path = self.output / LEDGER
        if not path.is_file():
            if self.output.is_file() or (self.output.is_dir() and any(self.output.glob("[!.]*"))):
                raise ValueError(f"{self.output} holds something else: expected a new folder, or one prepared before")
            return {}
        # a line without an end was being written when its run was killed
        first, *lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        before = json.loads(first)["settings"]
        check_settings(self.output, before, settings)
        return {line["shard"]: line["keys"] for line in map(json.loads, lines)}


def check_settings(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """ValueError if the run that a folder is of had other settings: a run goes on with its own alone."""
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        # a setting may be a table of tasks, which nobody would read in a line
        differences = ", ".join(
            f"{name} {before.get(name)} instead of {settings[name]}" if len(str(settings[name])) < 80 else name
            for name in changed
        )
        raise ValueError(f"{folder} was begun with other settings, {differences}; choose another folder")


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a run into its folder; see `check_settings`."""
    settings = json.loads(json.dumps(settings))
    if path.exists():
        check_settings(path.parent, json.loads(path.read_text(encoding="utf-8")), settings)
    write_whole(path, json.dumps(settings, indent=1) + "\n")


def content_version(shards: Sequence[Path]) -> str:
    """
    16 hexadecimal digits that change with what Parquet files hold (of signals their footers alone: counts, sizes,
    value ranges). In a card it keeps `datasets` from taking the cached rows of another folder of the same name for
    those of this one.
    """
    digest = hashlib.sha256()
    for shard in sorted(shards):
        with open(shard, "rb") as handle:
            handle.seek(-8, os.SEEK_END)
            length = int.from_bytes(handle.read(4), "little")
            handle.seek(-8 - length, os.SEEK_END)
            digest.update(handle.read())
        # labels that change places leave the footer as it was
        names = [name for name in pq.read_schema(shard).names if name not in LARGE]
        digest.update(repr(pq.read_table(shard, columns=names).to_pydict()).encode())
    return digest.hexdigest()[:16]


def write_atlases(folder: Path, atlases: Iterable[Atlas]) -> None:
    """Write the atlases of a folder's scans: `atlases/NAME.json`, and NAME.npz of those that have parcels."""
    for atlas in atlases:
        path = folder / ATLASES / f"{atlas.name}.json"
        write_whole(path, json.dumps(atlas.to_dict(), ensure_ascii=False) + "\n")
        if atlas.parcels is not None:
            atlas.parcels.save(path.with_suffix(".npz"))


def read_atlases(folder: Path) -> dict[str, Atlas]:
    """By name; inverse of `write_atlases`."""
    found = {}
    for path in sorted((folder / ATLASES).glob("*.json")):
        parcels = path.with_suffix(".npz")
        values = json.loads(path.read_text(encoding="utf-8"))
        atlas = Atlas.from_dict(values, Parcels.load(parcels) if parcels.is_file() else None)
        found[atlas.name] = atlas
    return found


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz file: all of it or nothing."""

    def write(temporary: Path) -> None:
        # to an open file, because numpy adds an ending to a path
        with open(temporary, "wb") as handle:
            np.savez(handle, **arrays)

    write_whole(path, write)


def write_whole(path: Path, content: str | Callable[[Path], None]) -> None:
    """Write text, or what a function writes to the path it is given: all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if isinstance(content, str):
        temporary.write_text(content, encoding="utf-8")
    else:
        content(temporary)
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)
