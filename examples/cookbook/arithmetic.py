"""RL on sums: the cookbook's math_rl arithmetic environment and RL trainer, on OpenMinT.

A sum earns 1 when the last integer of the answer is right; an answer that doesn't end at its stop
sequence loses 0.1. Watch `env/all/reward/total` in <log_path>/metrics.jsonl.

    cd DATA/client                       # tokenizers lie here under the names of their bases
    export TINKER_BASE_URL=http://127.0.0.1:8411 TINKER_API_KEY=$(cat ../admin.key)
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    python .../examples/cookbook/arithmetic.py log_path=/tmp/arithmetic learning_rate=3e-4

Any field of Settings may follow as name=value. With `tinker-cookbook[math-rl]` installed,
`python -m tinker_cookbook.recipes.math_rl.train model_name=... renderer_name=role_colon` does the
same; that module imports the graders of harder problems too. See docs/cookbook.md.
"""

import asyncio

import chz
from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticDatasetBuilder
from tinker_cookbook.rl import train


@chz.chz
class Settings:
    log_path: str
    model_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    renderer_name: str = "role_colon"
    load_checkpoint_path: str | None = None
    lora_rank: int = 16
    learning_rate: float = 7e-4
    groups_per_batch: int = 8
    group_size: int = 8
    # Room for an answer and its end: with less, hardly any first answer earns more than another.
    max_tokens: int = 16
    max_steps: int = 12
    rolling_save_every: int = 0


def config_of(settings: Settings) -> train.Config:
    return train.Config(
        recipe_name="math_rl",
        log_path=settings.log_path,
        model_name=settings.model_name,
        renderer_name=settings.renderer_name,
        load_checkpoint_path=settings.load_checkpoint_path,
        dataset_builder=ArithmeticDatasetBuilder(
            batch_size=settings.groups_per_batch,
            group_size=settings.group_size,
            n_batches=settings.max_steps,
            model_name_for_tokenizer=settings.model_name,
            renderer_name=settings.renderer_name,
        ),
        lora_rank=settings.lora_rank,
        learning_rate=settings.learning_rate,
        max_tokens=settings.max_tokens,
        eval_every=0,
        save_every=0,
        rolling_save_every=settings.rolling_save_every,
    )


if __name__ == "__main__":
    asyncio.run(train.main(config_of(chz.entrypoint(Settings))))
