"""
fMRI-LM: a codec that turns fMRI into discrete tokens, and a language model that reads and predicts them.

The names are imported when one of them is first used: torch and transformers take seconds. That also makes the classes
known to transformers' Auto classes and pipelines, as does whichever comes second of `import fmrilm` and an import of
transformers' pipelines.
"""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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


class _Pipelines(MetaPathFinder, Loader):
    """Registers the classes as soon as transformers' pipelines are imported, so that they need not be imported now."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "transformers.pipelines":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # transformers' own packages are read through their specification's loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        # a module of ours that is being imported may be what needs the pipelines
        if f"{__name__}.pipeline_fmrilm" not in sys.modules:
            from . import auto_classes  # noqa: F401


if "transformers" in sys.modules:
    from . import auto_classes  # noqa: F401
else:
    sys.meta_path.insert(0, _Pipelines())
