"""What processes that train together have to agree on. A process that trains alone agrees with itself."""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks (in place)."""
    if _several():
        dist.all_reduce(values)
    return values


def same_on_all_ranks(values: torch.Tensor) -> torch.Tensor:
    """What the first rank has in `values`, on every rank (in place)."""
    if _several():
        dist.broadcast(values, 0)
    return values


def counts_and_rank(count: int, device: torch.device) -> tuple[list[int], int]:
    """`count` of each rank, and which of them is this one."""
    if not _several():
        return [count], 0
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return torch.cat(counts).tolist(), dist.get_rank()


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows [n, ...] of all ranks in rank order, n may differ, without gradient; and where this rank's begin."""
    counts, rank = counts_and_rank(len(rows), rows.device)
    if len(counts) == 1:
        return rows, 0
    padded = F.pad(rows.detach(), (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    gathered = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return gathered, sum(counts[:rank])


def random_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The same `count` rows on every rank, drawn without replacement out of the rows [n, dim] of all ranks."""
    counts, rank = counts_and_rank(len(rows), rows.device)
    chosen = same_on_all_ranks(torch.randperm(sum(counts)).to(rows.device))[:count]
    chosen = chosen - sum(counts[:rank])
    here = (chosen >= 0) & (chosen < len(rows))
    drawn = rows.new_zeros(len(chosen), *rows.shape[1:])
    drawn[here] = rows[chosen[here]]
    return sum_over_ranks(drawn)


__all__ = ["counts_and_rank", "gather_rows", "random_rows", "same_on_all_ranks", "sum_over_ranks"]
