"""Writes scaling.md out of counted operations and the rates that were measured: python docs/scaling.py"""

import runpy
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fmrilm import FmriCodecConfig


DOCS = Path(__file__).parent
PAGE, RATES = DOCS / "scaling.md", DOCS.parent / "benchmarks" / "results" / "rates.csv"
SCANS = (1_000, 40_000, 1_000_000)
# a scan: 10 minutes at TR 0.8 s in 450 ROIs; windows of 160 frames of 2.0 s, one beginning each 80 frames
VOLUMES, ROIS, WINDOWS, CODE_BYTES = 750, 450, 2, 4
# rows of stages 2 and 3 about a scan, tokens of a row, rows of a process at a time
ROWS, TOKENS, BATCH = 2 * WINDOWS, 320, 4
# assumed: operations in a second that a GPU reaches, 25 % of an H100's dense peak in bfloat16 (codec: float32)
REACHED, REACHED_BY_CODEC = 0.25 * 989e12, 0.25 * 67e12
# assumed: of all cores beside one
CORES = 0.7
CODECS = ("default", "small", "base", "large")
# those of SmolLM2, Qwen3 and Llama 3.1
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPE += ("head_dim", "vocab_size", "tie_word_embeddings")
LANGUAGE_MODELS = {
    "135 M": (576, 1536, 30, 9, 3, 64, 49152, True),
    "360 M": (960, 2560, 32, 15, 5, 64, 49152, True),
    "1.7 B": (2048, 8192, 24, 32, 32, 64, 49152, True),
    "4 B": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "8 B": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
TEXT = f"""# Scaling

Written by `python docs/scaling.py`. Operations and parameters are counted on models without weights. Figures without a
mark come from rates of one core that were measured ([`rates.csv`](../benchmarks/results/rates.csv) by
`python benchmarks/rates.py`), times cores and an assumed efficiency of {CORES}. **\\*** marks what is extrapolated
without any measurement: no GPU was measured, {REACHED / 1e12:.0f} TFLOP/s in bfloat16 and, for the codec,
{REACHED_BY_CODEC / 1e12:.0f} in float32 are assumed (H100). Nothing was run at its size; the codec's fit is left out.

A scan has {VOLUMES} volumes of the MNI grid at 2 mm (TR 0.8 s) in {ROIS} ROIs, and {WINDOWS} windows of 160 frames.
The language model reads {ROWS} rows of {TOKENS} tokens about it in stages 2 and 3. Configurations are those of
`training/configs/accelerate/`; on several machines, set `num_machines` and `num_processes`.

The release recipe differs: 32 levels (twice the codes), windows of 320 frames, and a fixed number of rows (60 in stage
2, 400 in stage 3) however many scans there are. For the rows counted here, run the stages one by one with `--rows` and
`--max_steps`; `fmrilm train release` does not take these options.
"""


@dataclass(frozen=True)
class Machine:
    """gpus: 0 on CPUs alone. efficiency: of its GPUs beside one (assumed). prepare, train: how to use it."""

    name: str
    cores: int
    gpus: int
    efficiency: float
    prepare: str
    train: str


MACHINES = (
    Machine("CPU, 16 cores", 16, 0, 1.0, "`--jobs 16`", "one process"),
    Machine("1 GPU, 16 cores", 16, 1, 1.0, "`--jobs 16`", "one process"),
    Machine("8 GPUs, 128 cores", 128, 8, 0.9, "`--jobs 128`", "`multi_process.yaml`, 8 processes"),
    Machine("64 GPUs, 8 x 128 cores", 1024, 64, 0.8, "`--scheduler`", "`multi_process.yaml`, 64 on 8 machines"),
)


def parameters(name: str) -> tuple[int, int]:
    """Parameters of a language model, and those of its matrix products."""
    config = LlamaConfig(**dict(zip(SHAPE, LANGUAGE_MODELS[name], strict=True)))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    total = sum(weight.numel() for weight in model.parameters())
    return total, total if config.tie_word_embeddings else total - model.get_input_embeddings().weight.numel()


def activations(name: str) -> float:
    """Bytes of a process: 34 for each unit of a layer and token (Korthikanti et al. 2022); logits, their gradient."""
    width, _, layers, *_, vocabulary, _ = LANGUAGE_MODELS[name]
    return BATCH * TOKENS * (34 * width * layers + 8 * vocabulary)


def time(seconds: float, mark: str) -> str:
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 0))
    unit, size = next(one for one in units if seconds >= 2 * one[1])
    return f"{seconds / max(size, 1):,.0f} {unit}{mark}" if seconds >= 1 else f"< 1 s{mark}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB *"


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *(row + [""] * (len(header) - len(row)) for row in rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"## {title}", "", *lines, ""])


def page() -> str:
    rates = pd.read_csv(RATES).set_index("what")["rate"]
    count = runpy.run_path(str(DOCS / "sizes.py"))["count"]
    codecs = {size: count(size) for size in CODECS}
    models = {name: parameters(name) for name in LANGUAGE_MODELS}
    core = rates["language model trained"] * 1e9
    small = FmriCodecConfig()
    per_window = {"codes": 10 * small.tokens_per_patch * small.num_quantizers * CODE_BYTES}
    per_window["features"] = 4 * small.num_scan_features
    of_scan = VOLUMES / rates["volumes read and parcellated"] + 1 / rates["scans standardised"]
    of_scan += WINDOWS / rates["windows described"]
    disk, encode, train, memory = [], [], [], []
    for scans in SCANS:
        sizes = [4 * VOLUMES * ROIS, *(WINDOWS * size for size in per_window.values())]
        disk.append([f"{scans:,}", *(f"{scans * size / 1e9:,.2f} GB" for size in [*sizes, sum(sizes)])])
        for machine in MACHINES:
            cores, gpus, mark = machine.cores * CORES, machine.gpus * machine.efficiency, " *" * bool(machine.gpus)
            place, cells = [f"{scans:,}", machine.name], []
            for size, (*_, (operations, _)) in codecs.items():
                on_core = 1 / rates["windows encoded"] if size == "default" else operations / core
                each = operations / REACHED_BY_CODEC / gpus if gpus else on_core / cores
                cells.append(time(scans * WINDOWS * each, mark))
            encode.append([*place, time(scans * of_scan / cores, ""), machine.prepare, *cells])
            # LoRA: forward, and backward without gradients of the weights
            work = [4 * scans * ROWS * TOKENS * used for _, used in models.values()]
            cells = [time(one / (REACHED * gpus if gpus else core * cores), mark) for one in work]
            train.append([*place, *cells, machine.train])
    for size, (_, total, weights, _) in codecs.items():
        memory.append(
            [f"codec, {size}", f"{total / 1e6:,.1f} M", f"{weights / 1e9:.2f} GB", "", gigabytes(16 * total)]
        )
    for name, (total, _) in models.items():
        full = [gigabytes(16 * total / shards + activations(name)) for shards in (1, 8, 64)]
        lora = gigabytes(4 * total + activations(name))
        memory.append([name, f"{total / 1e6:,.1f} M", f"{4 * total / 1e9:.2f} GB", lora, *full])
    place, shards = ["scans", "machine"], ["`fsdp2.yaml` on 8", "`fsdp2.yaml` on 64"]
    parts = [
        table("Disk", ["scans", "prepared", *per_window, "together"], disk),
        table(
            "Preparing, describing, and encoding by size of the codec", [*place, "both", "options", *CODECS], encode
        ),
        table("Stages 2 and 3 with LoRA, by language model", [*place, *models, "accelerate"], train),
        table("Memory of a process", ["model", "parameters", "float32", "LoRA", "full training", *shards], memory),
    ]
    return "\n".join([TEXT, *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
