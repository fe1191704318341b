"""
fMRI-LM: a codec that turns fMRI into discrete tokens, and a language model that reads and predicts them.

The names are imported when one of them is first used: torch and transformers take seconds. That also makes the classes
known to transformers' Auto classes. `import fmrilm` alone does so where transformers is imported already, and `import
fmrilm.auto_classes` anywhere.
"""

import sys
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .auto_classes import (
        Atlas,
        FmriCodecConfig,
        FmriCodecModel,
        FmriLMConfig,
        FmriLMFeatureExtractor,
        FmriLMForConditionalGeneration,
        FmriLMModel,
        FmriLMPipeline,
        FmriLMProcessor,
        ScanReader,
        load,
    )

__all__ = [
    "Atlas",
    "FmriCodecConfig",
    "FmriCodecModel",
    "FmriLMConfig",
    "FmriLMFeatureExtractor",
    "FmriLMForConditionalGeneration",
    "FmriLMModel",
    "FmriLMPipeline",
    "FmriLMProcessor",
    "ScanReader",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import auto_classes

    return getattr(auto_classes, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "transformers" in sys.modules:
    from . import auto_classes  # noqa: F401
