"""
What is left of the language model's language after the recipe: perplexity of held-out plain text.

    python benchmarks/language.py runs/people/*/fold*/sft/model

Each argument is a folder of a joint model made from the packaged language model.
"""

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from transformers import AutoTokenizer

from fmrilm.modeling_fmrilm import FmriLMForConditionalGeneration
from fmrilm.training.alignment.language_models import load_language_model
from fmrilm.training.alignment.plain_text import perplexity, plain_texts
from fmrilm.training.data.shards import write_whole


RESULTS = Path(__file__).parent / "results"


def main(models: Annotated[list[Path], typer.Argument(exists=True, file_okay=False)], results: Path = RESULTS) -> None:
    texts = plain_texts()[1]
    backbone, tokenizer = load_language_model()
    device: Any = torch.accelerator.current_accelerator() or "cpu"
    before, rows = perplexity(backbone.to(device).eval(), tokenizer, texts), []
    for place, folder in enumerate(models):
        model: Any = FmriLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        after = perplexity(model.to(device).eval(), AutoTokenizer.from_pretrained(folder), texts)
        rows.append({"model": place, "documents": len(texts), "backbone": before, "joint": after})
        rows[-1]["ratio"] = after / before
        print(rows[-1], flush=True)
        write_whole(results / "language.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.4f"))


if __name__ == "__main__":
    typer.run(main)
