"""The joint model cut up over two processes by torch's own `fully_shard`, as FSDP2 does on GPUs."""

from pathlib import Path

import torch
import torch.distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForMultimodalLM

from fmrilm import FmriLMForConditionalGeneration
from program_runs import run_two
from scan_rows import LONG, SHORT, codes, ids, pad


def half(model: FmriLMForConditionalGeneration, rank: int) -> dict[str, torch.Tensor]:
    """A process' rows: as many labels of text and of codes in each."""
    scan, word = (LONG, "yes") if rank else (LONG[::-1], "not")
    batch = pad([ids(model, "a", scan, word), ids(model, SHORT, "b")], "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "fmri_codes": codes(scan, SHORT), "labels": labels}


def step(model: FmriLMForConditionalGeneration, *batches: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    optimizer.step()


def train_sharded(folder: Path, output: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    model = FmriLMForConditionalGeneration.from_pretrained(folder).train()
    for layer in model.model.causal_lm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(value, DTensor) for value in model.parameters())
    step(model, half(model, rank))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(output, state_dict=whole, is_main_process=rank == 0)
    torch.distributed.destroy_process_group()


def test_sharded_step_and_its_checkpoint_equal_those_of_one_process(llama, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "start")
    run_two(train_sharded, tmp_path / "start", tmp_path / "trained")
    step(llama.train(), half(llama, 0), half(llama, 1))
    trained = AutoModelForMultimodalLM.from_pretrained(tmp_path / "trained").state_dict()
    start = AutoModelForMultimodalLM.from_pretrained(tmp_path / "start").state_dict()
    expected = llama.state_dict()
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(trained[name].float(), value.float(), atol=1e-6), name
    assert not torch.equal(trained["model.causal_lm.lm_head.weight"], start["model.causal_lm.lm_head.weight"])
    assert not torch.equal(trained["model.fmri_head.proj.weight"], start["model.fmri_head.proj.weight"])
