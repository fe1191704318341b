"""Encoding measured for `codec.py speed`: `python codec_speed.py KIND ROIS STEPS REPETITIONS SIZE` is one process."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fmrilm import FmriCodecConfig, FmriCodecModel


PATCH = 32
MATRIX = 2048
# what is encoded, ROIs and steps: the paper's 450 ROIs x 160 frames first, then growth along each axis
KINDS = ("latent", "roi", "transformer")
SIZES = ((450, 5), (100, 5), (1000, 5), (450, 1), (450, 20))


class PlainTransformer(nn.Module):
    """`torch.nn.TransformerEncoder` of the codec's size on one token for each ROI and step, all seeing all."""

    def __init__(self, config: FmriCodecConfig):
        super().__init__()
        self.embedding = nn.Linear(config.patch_length, config.hidden_size)
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)

    def encode(self, fmri_values: torch.Tensor, roi_coordinates: torch.Tensor) -> torch.Tensor:
        patches = fmri_values.unflatten(-1, (-1, PATCH)).transpose(1, 2).flatten(1, 2)
        return self.layers(self.embedding(patches))


def build(kind: str, size: str) -> nn.Module:
    """A model in evaluation mode; of the codec's decoder, which encoding does not use, one layer."""
    layout = "latent" if kind == "latent" else "roi"
    config = FmriCodecConfig.from_size(size, patch_length=PATCH, token_layout=layout, num_decoder_layers=1)
    return (PlainTransformer(config) if kind == "transformer" else FmriCodecModel(config)).eval()


def floating_point_operations(kind: str, size: str, rois: int, steps: int) -> int:
    """Of one scan, counted on tensors without memory; of the codec's attention, what it has to attend to."""
    # autocast, which the codec uses, knows no meta device; the plain transformer copies its layers, which fake tensors
    # do not survive
    with torch.device("meta") if kind == "transformer" else FakeTensorMode():
        model = build(kind, size)
        if kind != "transformer":
            model.set_attn_implementation("eager")
        # with gradients, so that PyTorch's transformer takes no shortcut that the counter does not know
        with FlopCounterMode(display=False) as counter:
            model.encode(torch.empty(1, rois, steps * PATCH), torch.empty(1, rois, 3))
    return counter.get_total_flops()


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def measure(kind: str, rois: int, steps: int, repetitions: int, size: str) -> dict:
    """Median seconds of a scan and of a matrix product between scans; the memory that encoding adds."""
    torch.manual_seed(0)
    model = build(kind, size)
    inputs = torch.randn(1, rois, steps * PATCH), 60 * torch.randn(1, rois, 3)
    loaded = peak_mib()
    model.encode(*inputs)
    memory = peak_mib() - loaded
    first, second = torch.randn(2, MATRIX, MATRIX)
    first @ second
    pairs = [(seconds(lambda: model.encode(*inputs)), seconds(lambda: first @ second)) for _ in range(repetitions)]
    taken, product = (sorted(values) for values in zip(*pairs, strict=True))
    return {
        "seconds": taken[repetitions // 2],
        "seconds_low": taken[0],
        "seconds_high": taken[-1],
        "mib_per_scan": memory,
        "matmul_gflops": 2 * MATRIX**3 / product[repetitions // 2] / 1e9,
        "threads": torch.get_num_threads(),
    }


def measurements(repetitions: int, quick: bool) -> Iterator[dict]:
    """Rows, one after the other."""
    size = "tiny" if quick else "base"
    cases = [(kind, *shape) for shape in (SIZES[:1] if quick else SIZES) for kind in KINDS]
    for kind, rois, steps in tqdm(cases, desc="encoding", unit="case"):
        command = [sys.executable, __file__, kind, str(rois), str(steps), str(repetitions), size]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        gflop = floating_point_operations(kind, size, rois, steps) / 1e9
        share = gflop / found["seconds"] / found["matmul_gflops"]
        yield {
            "encoder": kind,
            "size": size,
            "rois": rois,
            "steps": steps,
            "scans_per_second": 1 / found["seconds"],
            "gflop_per_scan": gflop,
            "share_of_matmul_rate": share,
            **found,
            "repetitions": repetitions,
        }


if __name__ == "__main__":
    kind, rois, steps, repetitions, size = sys.argv[1:]
    print(json.dumps(measure(kind, int(rois), int(steps), int(repetitions), size)))
