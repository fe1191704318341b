"""Official checkpoints (.pt files) as tensors and plain settings, without running anything that is in them."""

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


# Classes of settings that a checkpoint holds beside its tensors. None of them is imported or called.
SETTINGS = (
    "argparse.Namespace",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "builtins.tuple",
    "collections.defaultdict",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.StringNode",
    "pathlib.PosixPath",
    "typing.Any",
)


class StandIn:
    """Takes the place of every class in SETTINGS: keeps attributes, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __new__(cls, *args: Any, **kwargs: Any):
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Tensors by name and the settings (`model_args`) as plain data. Opened by torch's restricted unpickler, which calls
    nothing the file names; a file that names anything but tensors and SETTINGS is refused.
    """
    try:
        with torch.serialization.safe_globals([(StandIn, name) for name in SETTINGS]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else "it is no checkpoint of tensors and settings"
        raise ValueError(f"{path}: refused, {reason}; expected tensors and settings alone") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    # the tensors stand at the top, or one level down
    for tensors in (content, *content.values()):
        if isinstance(tensors, dict) and "pos_embed.weight" in tensors:
            named = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
            return named, plain(content.get("model_args")) or {}
    raise ValueError(
        f"{path}: expected tensors llm.*, tokenizer.*, pos_embed.weight and encode_transform_layer.0.*, got the keys "
        f"{', '.join(map(str, list(content)[:8]))}"
    )


def plain(value: Any) -> Any:
    """Settings as dicts, lists and values, out of OmegaConf nodes and namespaces."""
    if isinstance(value, StandIn):
        state = vars(value)
        value = state.get("_content", state.get("_val", state))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def setting(args: Any, name: str) -> Any:
    """The value of this name, however deep it stands in the settings; None without one."""
    if isinstance(args, list):
        args = dict(enumerate(args))
    if not isinstance(args, dict):
        return None
    found = [args.get(name), *(setting(item, name) for item in args.values())]
    return next((value for value in found if value is not None), None)
