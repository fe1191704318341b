"""
From scans in files to the inputs of the networks: atlases, parcellation, features, chat.

The names are imported when they are first used: reading scans needs no transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .atlases_fmrilm import Atlas, Parcels, read_parcels
    from .feature_extraction_fmrilm import FmriLMFeatureExtractor
    from .processing_fmrilm import (
        CHAT_TEMPLATE,
        FMRI_END,
        FMRI_PAD,
        FMRI_START,
        FMRI_SUMMARY,
        FmriLMProcessor,
        add_fmri_tokens,
        add_name_tokens,
    )
    from .scan_io_fmrilm import parcellate, read_scan

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
    "add_name_tokens",
    "parcellate",
    "read_parcels",
    "read_scan",
]

_MODULES = {
    "Atlas": "atlases_fmrilm",
    "FmriLMFeatureExtractor": "feature_extraction_fmrilm",
    "Parcels": "atlases_fmrilm",
    "parcellate": "scan_io_fmrilm",
    "read_parcels": "atlases_fmrilm",
    "read_scan": "scan_io_fmrilm",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("FmriLMFeatureExtractor", "FmriLMProcessor"):
        # opening a saved processor takes the Auto classes, with which the root of the package registers these two
        import_module("fmrilm.auto_classes")
    return getattr(import_module(f".{_MODULES.get(name, 'processing_fmrilm')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
