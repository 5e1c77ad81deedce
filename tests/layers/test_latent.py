"""Latent attention over cached latents asks for adapters in the form that it can multiply with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from openmint.config import WorkerConfig
from openmint.layers.adapters import AdapterBatch, AdapterLayout, AdapterStack, AdapterWeights
from openmint.layers.attention import Heads
from openmint.layers.latent import LatentAttention, LatentHeads
from openmint.models.loader import load_model
from openmint.types import Digest, LoraSpec
from tests.workbench import random_model

SPECS = (LoraSpec(4), LoraSpec(3, train_attn=False), LoraSpec(8))
SLOT_T = torch.tensor([0, 2, -1, 1, 2, 0])


class OwnKeys:
    """Each query sees its own key alone, scaled by a number of the query's, so that an error in
    either product shows."""

    def attend(self, heads: Heads, q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor) -> Tensor:
        return (q_THD.sum(-1, keepdim=True) * v_TGE).flatten(1)


@pytest.mark.parametrize("has_triton", [False, True])
def test_adapters_of_a_mixed_batch_have_their_part(
    has_triton: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Triton runs, layers of their own product get adapters in a form that isn't theirs."""
    folder = random_model("deepseek-v3", tmp_path)
    model, _ = load_model("m", folder, Digest("sha256:0"), WorkerConfig(dtype="float32"))
    draw, made = torch.Generator().manual_seed(0), []
    for spec in SPECS:
        layout = AdapterLayout(spec, [t for t in model.targets if t.group in spec.groups])
        made.append(AdapterWeights(layout, 0.3 * torch.randn(layout.num_params, generator=draw)))
    monkeypatch.setattr("openmint.layers.adapters.use_triton", lambda device: has_triton)
    batch = AdapterBatch(AdapterStack(made), SLOT_T)
    attention: LatentAttention = model.layers[0].attention  # type: ignore[attr-defined]
    shape, count = attention.shape, len(SLOT_T)
    q_THN, q_THP, latent_TR, k_T1P = (
        torch.randn(*each, generator=draw)
        for each in (
            (count, shape.num_heads, shape.from_latent),
            (count, shape.num_heads, shape.turned),
            (count, shape.latent),
            (count, 1, shape.turned),
        )
    )
    heads = LatentHeads(q_THN, q_THP, latent_TR, k_T1P)
    ours = attention._absorbed(heads, OwnKeys(), batch)  # type: ignore[arg-type]
    (path,) = attention._up.paths
    for token, slot in enumerate(SLOT_T.tolist()):
        weight_OI = attention._up.weight_OI.clone()  # type: ignore[attr-defined]
        if slot >= 0 and made[slot].has(path):
            a_RI, b_RO = made[slot].views[path]
            weight_OI += made[slot].spec.scaling * b_RO.t() @ a_RI
        key_HNR, value_HER = weight_OI.unflatten(0, (shape.num_heads, -1)).split(
            [shape.from_latent, shape.value], dim=1
        )
        q_HR = torch.einsum("hn,hnr->hr", q_THN[token], key_HNR)
        score_H1 = torch.cat((q_HR, q_THP[token]), dim=1).sum(-1, keepdim=True)
        expected = torch.einsum("hr,her->he", score_H1 * latent_TR[token], value_HER)
        torch.testing.assert_close(ours[token], expected.flatten(), rtol=1e-4, atol=1e-4)
