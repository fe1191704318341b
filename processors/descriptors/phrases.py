"""English phrases of descriptors, and the way back."""

from .measures import FAMILIES, descriptor_names
from .networks import NETWORKS


ORDINALS = {"1": "first", "2": "second", "3": "third"}
# A measure's phrase; {0} is the whole target or its first part, {1} its second one. "of the" and "between the" keep
# each phrase from standing inside another one.
MEASURE_PHRASES = {
    "connectivity": "connectivity between the {0} and {1} networks",
    "gradient_range": "range of the {0} gradient",
    "gradient_dispersion": "dispersion of the {0} gradient",
    "gradient_mean": "position on the {0} gradient of the {1}",
    "efficiency": "global efficiency of the brain graph",
    "modularity": "modularity of the brain graph",
    "clustering": "clustering of the brain graph",
    "strength": "overall connectivity of the {0}",
    "amplitude": "signal amplitude of the {0}",
    "variability": "signal variability of the {0}",
    "spectral_ratio": "low-to-high-frequency power ratio of the {0}",
    "autocorrelation": "signal persistence of the {0}",
    "outliers": "outlier rate of the {0}",
    "falff": "fractional low-frequency amplitude of the {0}",
    "fnc": "time-course coupling between the {0} and {1} networks",
}


def phrase(name: str) -> str:
    """A descriptor in English, for instance "connectivity within the visual network"."""
    measure, _, target = name.partition("/")
    parts = target.split("-")
    if measure == "connectivity" and parts[0] == parts[1]:
        return f"connectivity within the {NETWORKS[parts[0]]} network"
    if measure in ("connectivity", "fnc"):
        return MEASURE_PHRASES[measure].format(*(NETWORKS[part] for part in parts))
    return MEASURE_PHRASES[measure].format(*(_target(part) for part in parts))


def _target(part: str) -> str:
    if part == "global":
        return "whole brain"
    return ORDINALS[part] if part in ORDINALS else f"{NETWORKS[part]} network"


PHRASES = {name: phrase(name) for name in descriptor_names(FAMILIES)}
NAMES = {text: name for name, text in PHRASES.items()}
