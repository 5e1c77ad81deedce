"""Which experts a token takes, and how much each of them counts.

A family's rule has two steps, so that a choice made elsewhere can be weighed here: the sampler's,
when its tokens are trained. Choices carry no gradient, weights do. Shapes: T tokens, D hidden
size, E experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Router(Protocol):
    @property
    def num_experts(self) -> int: ...

    def logits(self, x_TD: Tensor) -> Tensor:
        """`[T, E]`."""
        ...

    def choose(self, logits_TE: Tensor) -> Tensor:
        """The experts of each token, int64 `[T, K]`."""
        ...

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """What each of these experts counts, `[T, K]`."""
        ...


@dataclass(frozen=True, slots=True)
class SoftmaxRouter:
    """The likeliest of all experts (arXiv:2101.03961): Qwen3, OLMoE, Mixtral."""

    weight_ED: Tensor
    num_chosen: int
    sums_to_one: bool
    """Whether the chosen ones' weights are made to."""

    @property
    def num_experts(self) -> int:
        return len(self.weight_ED)

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight_ED)

    def choose(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.float().topk(self.num_chosen, dim=-1).indices

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
        weight_TK = logits_TE.float().softmax(-1).gather(1, expert_TK)
        return weight_TK / weight_TK.sum(-1, keepdim=True) if self.sums_to_one else weight_TK


@dataclass(frozen=True, slots=True)
class TopSoftmaxRouter:
    """The softmax over the chosen experts alone: gpt-oss."""

    weight_ED: Tensor
    bias_E: Tensor
    num_chosen: int

    @property
    def num_experts(self) -> int:
        return len(self.weight_ED)

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.weight_ED, self.bias_E)

    def choose(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.topk(self.num_chosen, dim=-1).indices

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
        return logits_TE.gather(1, expert_TK).float().softmax(-1)


@dataclass(frozen=True, slots=True)
class SigmoidRouter:
    """The best experts of the best groups (arXiv:2412.19437), in float32: DeepSeek, Kimi, GLM.

    `bias_E` balances the load. It decides who is chosen and has no part in the weights.
    """

    weight_ED: Tensor
    bias_E: Tensor
    num_chosen: int
    num_groups: int
    num_chosen_groups: int
    sums_to_one: bool
    scale: float

    @property
    def num_experts(self) -> int:
        return len(self.weight_ED)

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD.float(), self.weight_ED)

    def choose(self, logits_TE: Tensor) -> Tensor:
        score_TE = logits_TE.sigmoid() + self.bias_E
        score_TGE = score_TE.view(len(score_TE), self.num_groups, -1)
        if self.num_chosen_groups < self.num_groups:
            best_TG = score_TGE.topk(2, dim=-1).values.sum(-1)
            group_TC = best_TG.topk(self.num_chosen_groups, dim=-1).indices
            is_out_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter_(1, group_TC, False)
            score_TGE = score_TGE.masked_fill(is_out_TG[..., None], float("-inf"))
        return score_TGE.flatten(1).topk(self.num_chosen, dim=-1).indices

    def weigh(self, logits_TE: Tensor, expert_TK: Tensor) -> Tensor:
        weight_TK: Tensor = logits_TE.sigmoid().gather(1, expert_TK)
        if self.sums_to_one:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
        return weight_TK * self.scale
