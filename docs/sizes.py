"""Prints the table of codec sizes that stands in concepts.md: counted on models without weights, nothing is run."""

from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from fmrilm import FmriCodecConfig, FmriCodecModel
from fmrilm.configuration_fmrilm import CODEC_SIZES


ROIS, FRAMES = 450, 160
SIZES = ("default", *CODEC_SIZES)


def count(size: str) -> tuple[FmriCodecConfig, int, int, list[int]]:
    """Of one of `SIZES`: configuration, parameters, bytes of the weights, operations of encoding and decoding."""
    config = FmriCodecConfig() if size == "default" else FmriCodecConfig.from_size(size)
    # the model asks about values, which meta tensors do not have, but not while it is compiled
    with torch.device("meta"), patch("torch.compiler.is_compiling", return_value=True):
        codec = FmriCodecModel(config).eval().requires_grad_(False)
        signal, coordinates = torch.empty(1, ROIS, FRAMES), torch.empty(1, ROIS, 3)
        with FlopCounterMode(display=False) as encoding:
            codes = codec.encode(signal, coordinates)
        with FlopCounterMode(display=False) as decoding:
            codec.decode(codes, coordinates)
    parameters = sum(weight.numel() for weight in codec.parameters())
    weights = 4 * (parameters + sum(buffer.numel() for buffer in codec.buffers()))
    return config, parameters, weights, [counter.get_total_flops() for counter in (encoding, decoding)]


def row(size: str) -> str:
    """A row of the table: one of `SIZES`."""
    config, parameters, weights, operations = count(size)
    layers = f"{config.num_hidden_layers} + {config.num_decoder_layers}"
    work = [f"{number / 1e9:.2f} GFLOP" for number in operations]
    cells = [size, config.hidden_size if config.num_hidden_layers else "", layers, f"{parameters / 1e6:.1f} M"]
    return " | ".join(["", *map(str, cells), f"{weights / 2**20:,.0f} MiB", *work, ""]).strip()


if __name__ == "__main__":
    print("| size | width | layers (encoder + decoder) | parameters | weights | encode | decode |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(map(row, SIZES)))
