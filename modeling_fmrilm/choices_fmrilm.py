"""Several answers to one prompt as a tree of tokens: what they begin with alike is read once, all in one row."""

import torch
import torch.nn.functional as F


class ChoiceTree:
    """
    The tokens that have to be read to score answers: every beginning of one, once, as a node behind the prompt.

    nodes: beginnings in an order in which parents come first. depths: int [nodes], tokens before a node in its answer.
    sees: bool [nodes, nodes], itself and what it continues.
    """

    def __init__(self, choices: list[list[int]], device: torch.device):
        self.choices = choices
        beginnings = (tuple(choice[:end]) for choice in choices for end in range(1, len(choice)))
        self.nodes = list(dict.fromkeys(beginnings))
        self.input_ids = torch.tensor([node[-1] for node in self.nodes], dtype=torch.long, device=device)
        self.depths = torch.tensor([len(node) - 1 for node in self.nodes], dtype=torch.long, device=device)
        self.sees = torch.tensor(
            [[node[: len(other)] == other for other in self.nodes] for node in self.nodes], device=device
        )

    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        """
        The nodes' attention [batch, 1, nodes, cached + nodes] from that of one answer as deep as the tree, [batch, 1,
        depth, cached + depth]: at its depth a node sees as much of the prompt, and of the nodes those of its answer.
        """
        if mask.ndim != 4:
            raise ValueError(
                "expected a language model of attention layers alone to score answers of several tokens, got one with "
                f"layers that take a mask of shape {tuple(mask.shape)}: what they keep of a prompt goes on in one way"
            )
        cached = mask.shape[-1] - mask.shape[-2]
        columns = torch.cat([torch.arange(cached, device=mask.device), cached + self.depths])
        hidden = F.pad(~self.sees, (cached, 0))
        never = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask[:, :, self.depths][..., columns].masked_fill(hidden, never)

    def totals(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Log-likelihoods [batch, choices] from those of every token after the prompt, and after each node: [batch,
        1 + nodes, vocabulary].
        """
        place = {(): 0} | {node: number for number, node in enumerate(self.nodes, 1)}
        totals = []
        for choice in self.choices:
            path = [place[tuple(choice[:end])] for end in range(len(choice))]
            totals.append(scores[:, path, choice].sum(-1))
        return torch.stack(totals, -1)


__all__ = ["ChoiceTree"]
