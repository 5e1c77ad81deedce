"""`openmint plan`: where a base goes on some GPUs, and what fits beside it, from its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmint.cli.output import JsonFlag, console, progress, show

if TYPE_CHECKING:
    from openmint.plan.plan import Plan

ADAPTER_COLUMNS = (
    "rank",
    "targets",
    "parameters",
    "adapter",
    "slot_per_gpu",
    "run_per_gpu",
    "slots",
    "runs",
)


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    base: Annotated[Path, typer.Option(help="Hugging Face folder, or config.json alone.")],
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs there are.")],
    gpu_memory: Annotated[float, typer.Option(min=0.001, help="Memory of each, GB (10^9 bytes).")],
    rank: Annotated[
        list[int] | None,
        typer.Option(min=1, help="LoRA rank to plan for; default 8 and 32. Repeatable."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say how a base would be divided among GPUs, what each of them would hold, and how much KV
    cache and how many adapters and training runs fit beside it. No weights are needed.

    What doesn't fit is refused, with the numbers and what would help.
    """
    # These load torch, which other commands don't need.
    from openmint.plan.base import planned_base
    from openmint.plan.plan import GB, make_plan

    with progress("building layers without memory") as display:
        (task,) = display.task_ids
        found = planned_base(
            base, "bfloat16", lambda n, of: display.update(task, completed=n, total=of)
        )
    made = make_plan(found, gpus, round(gpu_memory * GB), rank or (8, 32))
    if as_json:
        show(made, as_json=True)
    else:
        _show(made)


def _show(made: Plan) -> None:
    show(_summary(made), as_json=False)
    console.print("\n[bold]memory of each GPU[/bold]")
    show(list(_memory(made)), as_json=False, columns=("what", "size"))
    console.print("\n[bold]adapters of one worker[/bold]")
    show(list(_adapters(made)), as_json=False, columns=ADAPTER_COLUMNS)
    for note in made.notes:
        console.print(f"\nnote: {note}", markup=False)


def _summary(made: Plan) -> Mapping[str, Any]:
    from openmint.plan.plan import gpus_of, size

    place, kv, traffic = made.placement, made.kv, made.traffic
    found = {
        "base": f"{made.base} ({made.architecture})",
        "parameters": f"{made.num_params / 1e9:,.1f} billion in {made.dtype}",
        "workers": f"{place.workers} of {gpus_of(place.ranks)}",
        "tensor parallel": place.tensor,
        "expert parallel": place.expert,
        "data parallel": place.data,
        "KV cache": f"{kv.tokens:,} tokens a worker, {size(kv.bytes_per_token)} each on each GPU",
        "summed per token": f"{size(traffic.sampled_token)} in {traffic.sums_per_token} sums to "
        f"sample, {size(traffic.trained_token)} to train",
    }
    if kv.record_bytes_per_token:
        record = (
            f"{size(kv.record_bytes_per_token)} for each token in the KV cache, of what it chose"
        )
        if kv.index_bits_per_key:
            record += f", and at most {kv.index_bits_per_key} bits for each key before it"
        found["host memory"] = record
    if traffic.gathered_per_pass:
        found["gathered per pass"] = f"{size(traffic.gathered_per_pass)} of weights on each GPU"
    return found


def _memory(made: Plan) -> Iterator[Mapping[str, str]]:
    from openmint.plan.plan import size

    memory = made.memory
    parts: dict[str, int] = {
        **memory.weights,
        "weights, all": memory.weights_total,
        "a gathered layer": memory.gathered,
        "reserve": memory.reserved,
        "KV cache": made.kv.bytes_per_rank,
        "serving slots": made.kv.bytes_per_rank,
        "training": made.kv.bytes_per_rank,
    }
    for what, num_bytes in parts.items():
        if num_bytes:
            yield {"what": what, "size": size(num_bytes)}


def _adapters(made: Plan) -> Iterator[Mapping[str, Any]]:
    from openmint.plan.plan import size

    for each in made.adapters:
        yield {
            "rank": each.rank,
            "targets": ", ".join(each.targets),
            "parameters": f"{each.num_params:,}",
            "adapter": size(each.adapter_bytes),
            "slot_per_gpu": size(each.slot_bytes),
            "run_per_gpu": size(each.run_bytes),
            "slots": each.slots,
            "runs": each.runs,
        }
