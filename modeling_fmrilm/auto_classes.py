"""The public names of the package; importing them here makes them known to the Auto classes and pipelines."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_fmrilm import FmriCodecConfig, FmriLMConfig
from .modeling_fmricodec import FmriCodecModel
from .modeling_fmrilm import FmriLMForConditionalGeneration, FmriLMModel
from .pipeline_fmrilm import FmriLMPipeline
from .processors.atlases_fmrilm import Atlas as Atlas
from .processors.feature_extraction_fmrilm import FmriLMFeatureExtractor
from .processors.processing_fmrilm import FmriLMProcessor
from .scan_reader import ScanReader as ScanReader
from .scan_reader import load as load


class _RegisteredPipelines(dict):
    """A folder's own pipelines by name; as the package's are registered, none of their code is wanted."""

    def __contains__(self, task: object) -> bool:
        return False


def _set_pipelines(config: FmriLMConfig, pipelines: dict[str, Any]) -> None:
    config.__dict__["custom_pipelines"] = pipelines


# otherwise `pipeline` would ask for trust_remote_code, although it is this package's pipeline that serves
setattr(  # noqa: B010 - no attribute of the class for a type checker
    FmriLMConfig,
    "custom_pipelines",
    property(lambda config: _RegisteredPipelines(config.__dict__.get("custom_pipelines", {})), _set_pipelines),
)

AutoConfig.register("fmri_codec", FmriCodecConfig, exist_ok=True)
AutoConfig.register("fmrilm", FmriLMConfig, exist_ok=True)
AutoModel.register(FmriCodecConfig, FmriCodecModel, exist_ok=True)
AutoModel.register(FmriLMConfig, FmriLMModel, exist_ok=True)
AutoModelForCausalLM.register(FmriLMConfig, FmriLMForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(FmriLMConfig, FmriLMForConditionalGeneration, exist_ok=True)
AutoFeatureExtractor.register(FmriCodecConfig, FmriLMFeatureExtractor, exist_ok=True)
AutoFeatureExtractor.register(FmriLMConfig, FmriLMFeatureExtractor, exist_ok=True)
AutoProcessor.register(FmriLMConfig, FmriLMProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline("fmri-text-to-text", FmriLMPipeline, pt_model=AutoModelForMultimodalLM)
