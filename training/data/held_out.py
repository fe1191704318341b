"""The people whom no program trains on, and whom evaluations are about: one rule for all stages."""

import hashlib
from collections.abc import Iterable


HELD_OUT_SHARE = 0.2
# another one draws other people: checkpoints from before a change would be tested on people they were trained on
SALT = "held out 307"


def held_out_people(subjects: Iterable[str], share: float = HELD_OUT_SHARE) -> set[str]:
    """
    About this share of the subjects, drawn by a hash of each one's name. Nothing else counts, neither a seed nor who
    else is there: a codec, a corpus, a tuned model and an evaluation have the same people held out, whatever part of
    the data each of them reads, and those of a smaller share are among those of a larger one.
    """
    if not 0 <= share < 1:
        raise ValueError(f"expected a share of held-out subjects from 0 to below 1, got {share}")
    return {subject for subject in subjects if _place(subject) < share}


def _place(subject: str) -> float:
    """Uniform from 0 to below 1."""
    digest = hashlib.sha256(f"{SALT} {subject}".encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32
