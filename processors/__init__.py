"""From scans in files to the inputs of the networks: atlases, parcellation, features, chat."""

from .atlases import Atlas
from .feature_extraction_fmrilm import FmriLMFeatureExtractor
from .parcellation import parcellate
from .parcels_fmrilm import Parcels
from .processing_fmrilm import (
    CHAT_TEMPLATE,
    FMRI_END,
    FMRI_PAD,
    FMRI_START,
    FmriLMProcessor,
    add_fmri_tokens,
)
from .scan_files_fmrilm import read_parcels, read_scan


# every save then brings the code along, so that it loads where this package is not installed
FmriLMFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
FmriLMProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "CHAT_TEMPLATE",
    "FMRI_END",
    "FMRI_PAD",
    "FMRI_START",
    "Atlas",
    "FmriLMFeatureExtractor",
    "FmriLMProcessor",
    "Parcels",
    "add_fmri_tokens",
    "parcellate",
    "read_parcels",
    "read_scan",
]
