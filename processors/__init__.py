"""
From scans in files to the inputs of the networks: atlases, parcellation, features, chat.

The names are imported when they are first used: reading scans needs no transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .atlases import Atlas
    from .feature_extraction_fmrilm import FmriLMFeatureExtractor
    from .parcellation import parcellate
    from .parcels_fmrilm import Parcels
    from .processing_fmrilm import (
        CHAT_TEMPLATE,
        FMRI_END,
        FMRI_PAD,
        FMRI_START,
        FMRI_SUMMARY,
        FmriLMProcessor,
        add_fmri_tokens,
    )
    from .scan_files_fmrilm import read_parcels, read_scan

__all__ = [
    "CHAT_TEMPLATE",
    "FMRI_END",
    "FMRI_PAD",
    "FMRI_START",
    "FMRI_SUMMARY",
    "Atlas",
    "FmriLMFeatureExtractor",
    "FmriLMProcessor",
    "Parcels",
    "add_fmri_tokens",
    "parcellate",
    "read_parcels",
    "read_scan",
]

_MODULES = {
    "Atlas": "atlases",
    "FmriLMFeatureExtractor": "feature_extraction_fmrilm",
    "Parcels": "parcels_fmrilm",
    "parcellate": "parcellation",
    "read_parcels": "scan_files_fmrilm",
    "read_scan": "scan_files_fmrilm",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("FmriLMFeatureExtractor", "FmriLMProcessor"):
        # opening a saved processor takes the Auto classes, which the root of the package tells of these two
        import_module("fmrilm.auto_classes")
    return getattr(import_module(f".{_MODULES.get(name, 'processing_fmrilm')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
