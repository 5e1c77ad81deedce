"""A base as its config describes it: what it holds, tensor kind by tensor kind, and what can be
adapted. Built without memory, from the family's own code."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Literal

from transformers import PretrainedConfig

from openmint.config import WorkerConfig
from openmint.errors import InvalidRequest
from openmint.models.loader import (
    DTYPES,
    FAMILIES,
    architecture_of,
    describe,
    read_config,
)
from openmint.models.meta import Read, meta_model, shapes_of
from openmint.models.mixture import usual_name
from openmint.models.model import CacheShape, RouteShape
from openmint.models.quantized import METHODS, quantization_of, remedy
from openmint.plan.placement import Placement, Widths, cuts_of
from openmint.types import EXPERT, LAYER, BaseInfo, Digest, LoraSpec, TargetStack

Share = Literal["attention", "feed-forward", "routed experts", "embedding and head", "others"]
SHARES: tuple[tuple[str, Share], ...] = (
    (r".*norm\.\w+|.*indexer\..*|mlp\.(gate|router)\..*", "others"),
    (r"self_attn\..*", "attention"),
    (r"mlp\.experts\..*", "routed experts"),
    (r"mlp\..*", "feed-forward"),
    (r".*", "embedding and head"),
)
"""Of a base's bytes, by the names of tensors without layer and expert."""
GATHERED = re.compile(r"(?!.*indexer).*_proj(_with_mqa)?(\.weight)?")
"""Weights of a block's linear layers."""
MOST_NAMES = 8
"""In one message."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Tensors that differ in their layer and expert alone."""

    name: str
    """Without layer and expert."""
    shape: tuple[int, ...]
    count: int
    of_experts: bool
    """Whether each belongs to one expert."""
    is_gathered: bool
    """Whether ranks that divide data have some of its rows each, and gather them to compute."""
    itemsize: int
    """Bytes of a value."""

    @property
    def share(self) -> Share:
        return next(share for names, share in SHARES if re.fullmatch(names, self.name))

    @property
    def values(self) -> int:
        return self.count * prod(self.shape)

    def bytes_on(self, placement: Placement) -> int:
        """What a rank holds of them."""
        return self.itemsize * self._values_on(placement)

    def _values_on(self, placement: Placement) -> int:
        if placement.data > 1:
            return ceil(self.values / placement.ranks) if self.is_gathered else self.values
        each = prod(placement.sizes(self.name, self.shape, self.of_experts))
        return placement.count(self.count, self.of_experts) * each


def kinds_of(reads: Iterable[Read]) -> list[Kind]:
    counts: Counter[tuple[str, tuple[int, ...], bool, bool, int]] = Counter()
    seen = set()
    for read in reads:
        name = EXPERT.sub("", LAYER.sub("", usual_name(read.name)))
        # Whatever is taken once more is for another use than the layer's.
        is_gathered = GATHERED.fullmatch(name) is not None and read.name not in seen
        seen.add(read.name)
        is_expert = EXPERT.search(read.name) is not None
        counts[name, read.shape, is_expert, is_gathered, read.itemsize] += 1
    return [
        Kind(name, shape, count, is_expert, is_gathered, itemsize)
        for (name, shape, is_expert, is_gathered, itemsize), count in counts.items()
    ]


@dataclass(frozen=True, slots=True)
class PlannedBase:
    """Everything about a base that a plan asks."""

    info: BaseInfo
    num_params: int
    """Of the checkpoint."""
    itemsize: int
    kinds: Sequence[Kind]
    largest_layer: Sequence[Kind]
    table_bytes: int
    """Cosines and sines of positions."""
    cache: CacheShape
    routes: RouteShape | None
    num_layers: int
    num_mixtures: int
    """Layers that have experts."""
    hidden_size: int
    widths: Widths
    notes: tuple[str, ...]

    def share_bytes(self, placement: Placement) -> dict[Share, int]:
        """What a rank of a worker holds of the base."""
        found: dict[Share, int] = defaultdict(int)
        for kind in self.kinds:
            found[kind.share] += kind.bytes_on(placement)
        found["others"] += self.table_bytes
        return dict(found)

    def layer_bytes(self, placement: Placement) -> int:
        """What a rank holds of the largest layer."""
        return sum(kind.bytes_on(placement) for kind in self.largest_layer)

    @property
    def gathered_layer_bytes(self) -> int:
        """What is gathered of the largest layer."""
        return self.itemsize * sum(k.values for k in self.largest_layer if k.is_gathered)

    @property
    def gathered_bytes(self) -> int:
        """What is gathered of all layers."""
        return self.itemsize * sum(kind.values for kind in self.kinds if kind.is_gathered)

    def token_bytes(self, placement: Placement) -> int:
        """What a token leaves in a rank's KV cache: its heads', or latents, which all ranks have;
        and the keys of indexers."""
        cache = self.cache
        index = cache.index[0] * cache.index[1]
        heads = cache.num_values - index
        if placement.by_tensor and cache.value_width:
            heads //= placement.ranks
        return self.itemsize * (heads + index)

    @property
    def record_bytes(self) -> int:
        """Of host memory that a token's choices take while it is in the KV cache, but for those of
        indexers."""
        routes = self.routes
        if routes is None:
            return 0
        return routes.num_layers * routes.num_chosen * routes.expert_dtype.itemsize

    @property
    def index_bits(self) -> int:
        """That they take at most for each key that indexers chose among, where those are more than
        they leave."""
        return self.routes.num_indexers if self.routes else 0

    def adapter_values(self, spec: LoraSpec, placement: Placement) -> tuple[int, int]:
        """Of an adapter, what a rank holds, and how much of that has its gradients summed over
        ranks: the halves of cut targets that aren't cut; where data are divided, all."""
        held = summed = 0
        for stack in self.info.stacks_of(spec):
            num_out, num_in = self._sizes(stack, placement)
            count = spec.rank * placement.count(len(stack.targets), _of_experts(stack))
            held += count * (num_in + num_out)
            if num_out < stack.num_out:
                summed += count * num_in
            elif num_in < stack.num_in:
                summed += count * num_out
        return held, held if placement.data > 1 else summed

    def _sizes(self, stack: TargetStack, placement: Placement) -> tuple[int, int]:
        shape = stack.num_out, stack.num_in
        num_out, num_in = placement.sizes(f"{stack.name}.weight", shape, _of_experts(stack))
        return num_out, num_in


def _of_experts(stack: TargetStack) -> bool:
    return len(stack.grid) > 1


def planned_base(path: Path, dtype: str, note: Callable[[int, int], None]) -> PlannedBase:
    """The base of a Hugging Face folder or a config.json. `note` hears how many layers are built,
    and of how many.

    Raises InvalidRequest for a base that we don't compute.
    """
    config = read_config(path)
    architecture = architecture_of(config)
    if architecture not in FAMILIES:
        raise _unsupported(architecture, config)
    layers = config.num_hidden_layers
    model, reads = meta_model(architecture, config, DTYPES[dtype], lambda n: note(n, layers))
    settings = WorkerConfig(device="meta", dtype=dtype)
    info = describe(
        model,
        config,
        settings,
        name=_name_of(path.resolve()),
        digest=Digest(""),
        directory=str(path),
    )
    kinds = kinds_of(reads)
    experts = {stack.grid for stack in info.stacks if _of_experts(stack)}
    num_mixtures, num_experts = next(iter(experts), (0, 0))
    return PlannedBase(
        info=info,
        num_params=sum(prod(shape) for shape in {r.name: r.shape for r in reads}.values()),
        itemsize=DTYPES[dtype].itemsize,
        kinds=kinds,
        largest_layer=_largest_layer(reads),
        table_bytes=model.rotary.cos_ND.nbytes + model.rotary.sin_ND.nbytes,
        cache=model.cache_shape,
        routes=model.route_shape,
        num_layers=layers,
        num_mixtures=num_mixtures,
        hidden_size=config.hidden_size,
        widths=_widths(config, kinds, model.cache_shape, num_experts),
        notes=_notes(config, dtype),
    )


def _name_of(path: Path) -> str:
    if path.is_dir():
        return path.name
    return path.parent.name if path.name == "config.json" else path.stem


def _largest_layer(reads: Sequence[Read]) -> list[Kind]:
    layers: dict[int, list[Read]] = defaultdict(list)
    for read in reads:
        if match := LAYER.match(read.name):
            layers[int(match[1])].append(read)
    return kinds_of(max(layers.values(), key=lambda reads: sum(prod(r.shape) for r in reads)))


def _widths(
    config: PretrainedConfig, kinds: Sequence[Kind], cache: CacheShape, num_experts: int
) -> Widths:
    tensor: set[int] = {config.num_attention_heads}
    of_experts: set[int] = set()
    shared: set[int] = set()
    if cache.value_width:
        tensor.add(cache.num_kv_heads)
    for kind in kinds:
        cuts = cuts_of(kind.name) or ()
        for width, axis in zip(kind.shape, cuts, strict=False):
            if axis == "shared":
                shared.add(width)
            elif axis == "tensor":
                (of_experts if kind.share == "routed experts" else tensor).add(width)
    if not _divides_by_heads(kinds):
        tensor.add(1)
    return Widths(frozenset(tensor), frozenset(of_experts), frozenset(shared), num_experts)


def _divides_by_heads(kinds: Sequence[Kind]) -> bool:
    """Not if queries are normalised all together, or made beside the latent."""
    shapes = {kind.name: kind.shape for kind in kinds}
    q_norm, q = shapes.get("self_attn.q_norm.weight"), shapes.get("self_attn.q_proj.weight")
    if q_norm is not None and q is not None and q_norm[0] == q[0]:
        return False
    return not (q is not None and "self_attn.kv_a_proj_with_mqa.weight" in shapes)


def _notes(config: PretrainedConfig, dtype: str) -> tuple[str, ...]:
    method = quantization_of(config)
    if method is None:
        return ()
    if method in METHODS:
        return (f"the checkpoint's weights are quantized by {method}; they are held in {dtype}",)
    return (f"the checkpoint is quantized by {method!r}, which is not read; {remedy()}",)


def _unsupported(architecture: str, config: PretrainedConfig) -> InvalidRequest:
    known = ", ".join(sorted(FAMILIES))
    return InvalidRequest(
        f"architecture {architecture!r} is not supported; missing: {_missing(config)}. "
        f"Supported: {known}"
    )


def _missing(config: PretrainedConfig) -> str:
    """Tensors of this config's model that no family has."""
    try:
        names = {EXPERT.sub("", LAYER.sub("", name)) for name in shapes_of(config)}
    except InvalidRequest:
        return "a model in transformers that reads text alone and continues it"
    unknown = sorted(name for name in names if cuts_of(name) is None)
    if not unknown:
        return "a family in openmint/models; all kinds of tensors that it has are known"
    rest = f" and {len(unknown) - MOST_NAMES} more" if len(unknown) > MOST_NAMES else ""
    return f"layers that compute with {', '.join(unknown[:MOST_NAMES])}{rest}"
