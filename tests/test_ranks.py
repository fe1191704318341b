"""Two real processes that train together end where one process on the joined batches does."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from fmrilm.configuration_fmrilm import FmriCodecConfig
from fmrilm.modeling_fmricodec import FmriCodecAlignment, ResidualVectorQuantizer
from program_runs import run_two


Job = Callable[[int | None], dict[str, torch.Tensor]]
DIM = 4


def batches(rank: int | None) -> list[torch.Tensor]:
    """Vectors of a rank, of unequal number, or of both joined; the later ones lie in one corner."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for step in range(6):
        z = torch.randn(30, DIM, generator=generator) + (torch.tensor([9.0, 0, 0, 0]) if step > 2 else 0)
        cut = len(z) // 3
        parts.append({None: z, 0: z[:cut], 1: z[cut:]}[rank])
    return parts


def train_quantizer(rank: int | None) -> dict[str, torch.Tensor]:
    sizes = {"num_quantizers": 3, "codebook_size": 16, "codebook_dim": DIM, "codebook_groups": 2}
    config = FmriCodecConfig(**sizes, ema_decay=0.8, revival_threshold=0.5)
    quantizer, revived = ResidualVectorQuantizer(config), 0
    for z in batches(rank):
        before = quantizer.usage.clone()
        quantizer(z[None], torch.ones(1, len(z), dtype=torch.bool))
        revived += int(((quantizer.usage == 1) & (before < 1)).sum())
    return {**quantizer.state_dict(), "revived": torch.tensor(revived)}


def scans_and_texts(rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(6, 9, generator=generator), torch.randn(6, 12, generator=generator)
    rows = {None: slice(None), 0: slice(0, 3), 1: slice(3, 6)}[rank]
    return both[0][rows], both[1][rows]


def align(rank: int | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    # as many scan features as `scans_and_texts` gives
    head = FmriCodecAlignment(
        FmriCodecConfig(text_hidden_size=12, alignment_size=5, num_basis_functions=3, num_networks=0)
    )
    scans, texts = scans_and_texts(rank)
    loss = head.siglip(head.embed_scans(scans), texts)
    loss.backward()
    gradients = {name: value.grad for name, value in head.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **gradients}


def run_rank(job: Job, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # what a rank draws by itself differs from what the other draws
    torch.manual_seed(rank)
    torch.save(job(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def of_both(job: Job, folder: Path) -> list[dict[str, torch.Tensor]]:
    run_two(run_rank, job, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_codebooks_of_two_processes_are_identical_and_that_of_one_process(tmp_path: Path) -> None:
    first, second = of_both(train_quantizer, tmp_path)
    torch.manual_seed(0)
    alone = train_quantizer(None)
    assert alone["started"] and alone["revived"] > 0
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name].float(), expected.float(), atol=1e-5), name


def test_alignment_of_two_processes_is_that_of_one_process(tmp_path: Path) -> None:
    first, second = of_both(align, tmp_path)
    alone = align(None)
    assert set(alone) == {"loss", "scan_proj.weight", "text_proj.weight", "log_scale", "bias"}
    assert abs(first["loss"] - second["loss"]) > 1e-4
    for name, expected in alone.items():
        # as training in parallel averages gradients
        assert torch.allclose((first[name] + second[name]) / 2, expected, atol=1e-6), name
