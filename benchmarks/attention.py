"""
Training steps with the library's attention kernel on a CPU and with the plain one, in bfloat16: writes attention.csv.

    OMP_NUM_THREADS=1 python benchmarks/attention.py

LoRA on the packaged language model as in stage 3, with labels at every tenth token. Milliseconds are those of the
processor (one thread), which other processes change little: the least of some steps, the two in turn.
"""

import time
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from fmrilm.training.alignment.language_models import load_language_model


OUT = Path(__file__).parent / "results" / "attention.csv"
# rows of a batch, and tokens of a row
SHAPES, STEPS = ((8, 180), (4, 350), (4, 480), (4, 700)), 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    torch.set_num_threads(1)
    language_model, _ = load_language_model()
    model = get_peft_model(language_model, LoraConfig(r=8, target_modules=TARGETS)).train()

    def step(ids: torch.Tensor) -> float:
        kept, start = torch.arange(0, ids.shape[1], 10), time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=kept, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, kept].flatten()).backward()
        return 1000 * (time.process_time() - start)

    rows = []
    for shape in SHAPES:
        ids, found = torch.randint(language_model.config.vocab_size, shape), {"sdpa": [], "eager": []}
        for number in range(1 + STEPS):
            for name, milliseconds in found.items():
                language_model.set_attn_implementation(name)
                spent = step(ids)
                # the first one of each warms up
                if number:
                    milliseconds.append(spent)
        least = {f"{name}_ms": min(values) for name, values in found.items()}
        rows.append({"rows": shape[0], "tokens": shape[1], **least, "ratio": least["eager_ms"] / least["sdpa_ms"]})
        print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(OUT, index=False, float_format="%.3f")


if __name__ == "__main__":
    main()
