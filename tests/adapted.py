"""`transformers` with an adapter in its weights, differentiable in A and B.

A reference for families that `peft` can't train, and for all others.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from openmint.types import EXPERT, RunId
from tests.workbench import Workbench, reference


class AdaptedReference:
    """The model of a folder with the weights of a live run."""

    def __init__(self, directory: Path, bench: Workbench, run_id: RunId) -> None:
        run = bench.engine.runs[run_id]
        self._model = reference(directory)
        self._scaling = run.layout.spec.scaling
        self.leaves = {
            path: tuple(x.detach().float().clone().requires_grad_() for x in pair)
            for path, pair in run.weights.views.items()
        }

    def __call__(self, tokens: Tensor) -> Any:
        """What the model's own call returns."""
        return functional_call(self._model, self._adapted(), (tokens,))

    def gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of `(A_RI, B_RO)` since the last call; zero where nothing reached them."""
        found = {}
        for path, leaves in self.leaves.items():
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
            found[path] = (grads[0], grads[1])
            for leaf in leaves:
                leaf.grad = None
        return found

    def _adapted(self) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        experts: dict[str, dict[tuple[int, str], Tensor]] = defaultdict(dict)
        for path, (a_RI, b_RO) in self.leaves.items():
            delta_OI = self._scaling * b_RO.t() @ a_RI
            if expert := EXPERT.search(path):
                module, _, leaf = EXPERT.sub("", path).rpartition(".")
                experts[module][int(expert[1]), leaf] = delta_OI
            else:
                name = f"{path}.weight"
                changed[name] = self._model.get_parameter(name).detach() + delta_OI
        for module, deltas in experts.items():
            changed |= self._with_experts(module, deltas)
        return changed

    def _with_experts(
        self, module: str, deltas: dict[tuple[int, str], Tensor]
    ) -> dict[str, Tensor]:
        count = 1 + max(expert for expert, _ in deltas)
        gates, ups, downs = (
            torch.stack([deltas[expert, leaf] for expert in range(count)])
            for leaf in ("gate_proj", "up_proj", "down_proj")
        )
        names = f"{module}.gate_up_proj", f"{module}.down_proj"
        gate_up, down = (self._model.get_parameter(name).detach() for name in names)
        if self._model.config.model_type == "gpt_oss":  # transposed, and its columns alternate
            sides = torch.stack((gates, ups), dim=2).flatten(1, 2)
            return {names[0]: gate_up + sides.mT, names[1]: down + downs.mT}
        return {names[0]: gate_up + torch.cat((gates, ups), dim=1), names[1]: down + downs}
