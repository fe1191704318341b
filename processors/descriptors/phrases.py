"""What descriptors are called in English, and which descriptor an English phrase is."""

from .networks import NETWORKS


ORDINALS = {"1": "first", "2": "second", "3": "third"}
# A measure's phrase; {0} is the whole target or its first part, {1} its second one. "of the" and "between the" keep
# each phrase from standing inside another one.
MEASURES = {
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
    """What a descriptor is called in English, for instance "connectivity within the visual network"."""
    measure, _, target = name.partition("/")
    parts = target.split("-")
    if measure == "connectivity" and parts[0] == parts[1]:
        return f"connectivity within the {NETWORKS[parts[0]]} network"
    if measure in ("connectivity", "fnc"):
        return MEASURES[measure].format(*(NETWORKS[part] for part in parts))
    return MEASURES[measure].format(*(_target(part) for part in parts))


def _target(part: str) -> str:
    if part == "global":
        return "whole brain"
    return ORDINALS[part] if part in ORDINALS else f"{NETWORKS[part]} network"


def _all_names():
    networks = list(NETWORKS)
    pairs = [f"{a}-{b}" for i, a in enumerate(networks) for b in networks[i:]]
    names = [f"connectivity/{p}" for p in pairs]
    names += [f"{m}/{o}" for m in ("gradient_range", "gradient_dispersion") for o in ORDINALS]
    names += [f"gradient_mean/{o}-{n}" for o in ORDINALS for n in networks]
    names += [f"{m}/global" for m in ("efficiency", "modularity", "clustering")]
    names += [f"strength/{n}" for n in networks]
    for m in ("amplitude", "variability", "spectral_ratio", "autocorrelation", "outliers", "falff"):
        names += [f"{m}/{n}" for n in [*networks, "global"]]
    return names + [f"fnc/{p}" for p in pairs if p.split("-")[0] != p.split("-")[1]]


PHRASES = {name: phrase(name) for name in _all_names()}
NAMES = {text: name for name, text in PHRASES.items()}
