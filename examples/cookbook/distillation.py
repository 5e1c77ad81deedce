"""On-policy distillation with the cookbook's trainer, on OpenMinT.

The student answers prompts, the teacher says how likely it finds each of the student's tokens, and
the student is rewarded for what the teacher would have said. Both live on one resident base: the
teacher is a sampler checkpoint, such as the last line of checkpoints.jsonl of a run of sl_jsonl.py.
Watch `teacher_kl`, the reverse KL per token, in <log_path>/metrics.jsonl.

    cd DATA/client                       # tokenizers lie here under the names of their bases
    export TINKER_BASE_URL=http://127.0.0.1:8411 TINKER_API_KEY=$(cat ../admin.key)
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    python .../examples/cookbook/distillation.py log_path=/tmp/distillation \
        teacher_checkpoint=tinker://.../sampler_weights/final

Any field of Settings may follow as name=value. See docs/cookbook.md.
"""

import asyncio
import json
from pathlib import Path

import chz
from tinker_cookbook import renderers
from tinker_cookbook.distillation import train_on_policy
from tinker_cookbook.distillation.datasets import (
    DistillationDatasetConfig,
    PromptOnlyDataset,
    TeacherConfig,
)
from tinker_cookbook.rl.types import RLDatasetBuilder
from tinker_cookbook.tokenizer_utils import get_tokenizer

DATA = Path(__file__).resolve().parent / "data"


@chz.chz
class PromptsFromJsonl(RLDatasetBuilder):
    """Prompts of a local file; the cookbook's own builder knows two data sets of the hub alone."""

    path: str
    model_name: str
    renderer_name: str
    groups_per_batch: int
    group_size: int

    async def __call__(self) -> tuple[PromptOnlyDataset, None]:
        lines = Path(self.path).read_text().splitlines()
        tokenizer = get_tokenizer(self.model_name)
        dataset = PromptOnlyDataset(
            prompts=[json.loads(line)["prompt"] for line in lines],
            batch_size=self.groups_per_batch,
            group_size=self.group_size,
            renderer=renderers.get_renderer(self.renderer_name, tokenizer=tokenizer),
            tokenizer=tokenizer,
        )
        return dataset, None


@chz.chz
class Settings:
    log_path: str
    teacher_checkpoint: str
    path: str = str(DATA / "unit_prompts.jsonl")
    model_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    renderer_name: str = "role_colon"
    lora_rank: int = 16
    learning_rate: float = 1e-3
    groups_per_batch: int = 8
    group_size: int = 4
    max_tokens: int = 12
    max_steps: int = 8


def config_of(settings: Settings) -> train_on_policy.Config:
    prompts = PromptsFromJsonl(
        path=settings.path,
        model_name=settings.model_name,
        renderer_name=settings.renderer_name,
        groups_per_batch=settings.groups_per_batch,
        group_size=settings.group_size,
    )
    teacher = TeacherConfig(
        base_model=settings.model_name, load_checkpoint_path=settings.teacher_checkpoint
    )
    return train_on_policy.Config(
        recipe_name="distillation",
        log_path=settings.log_path,
        model_name=settings.model_name,
        renderer_name=settings.renderer_name,
        dataset_configs=[
            DistillationDatasetConfig(
                dataset_builder=prompts,
                teacher_config=teacher,
                groups_per_batch=settings.groups_per_batch,
            )
        ],
        lora_rank=settings.lora_rank,
        learning_rate=settings.learning_rate,
        max_tokens=settings.max_tokens,
        max_steps=settings.max_steps,
        eval_every=0,
        save_every=0,
    )


if __name__ == "__main__":
    asyncio.run(train_on_policy.main(config_of(chz.entrypoint(Settings))))
