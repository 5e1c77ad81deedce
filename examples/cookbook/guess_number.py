"""Multi-turn RL: the cookbook's guess_number recipe on OpenMinT.

The player guesses an integer of 0 to 1024 and hears "Too low" or "Too high". A turn that isn't of
the form "Guess: <integer>" costs 1, the right number earns 1. A base of 135 M parameters doesn't
learn to search in a few steps; it learns the form, so `env/all/reward/total` in
<log_path>/metrics.jsonl climbs towards 0.

    cd DATA/client                       # tokenizers lie here under the names of their bases
    export TINKER_BASE_URL=http://127.0.0.1:8411 TINKER_API_KEY=$(cat ../admin.key)
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    python .../examples/cookbook/guess_number.py log_path=/tmp/guess_number

Any field of Settings may follow as name=value; max_turns=10 is the cookbook's own game. Each turn
is trained with the whole talk before it, so the work grows with the square of the turns.
See docs/cookbook.md.
"""

import asyncio

import chz
from tinker_cookbook.recipes.multiplayer_rl.guess_number import env
from tinker_cookbook.rl import train


@chz.chz
class Settings:
    log_path: str
    model_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    renderer_name: str = "role_colon"
    load_checkpoint_path: str | None = None
    lora_rank: int = 16
    learning_rate: float = 5e-4
    batch_size: int = 4
    group_size: int = 6
    max_turns: int = 2
    max_tokens: int = 8
    max_steps: int = 5


def config_of(settings: Settings) -> train.Config:
    return train.Config(
        recipe_name="guess_number",
        log_path=settings.log_path,
        model_name=settings.model_name,
        renderer_name=settings.renderer_name,
        load_checkpoint_path=settings.load_checkpoint_path,
        dataset_builder=env.GuessNumberDatasetBuilder(
            batch_size=settings.batch_size,
            model_name=settings.model_name,
            renderer_name=settings.renderer_name,
            train_group_size=settings.group_size,
        ),
        lora_rank=settings.lora_rank,
        learning_rate=settings.learning_rate,
        max_tokens=settings.max_tokens,
        max_steps=settings.max_steps,
        # The held-out set has 103 numbers with four players each: too long for a short run.
        eval_every=0,
        save_every=0,
    )


if __name__ == "__main__":
    settings = chz.entrypoint(Settings)
    env.MAX_TURNS = settings.max_turns
    asyncio.run(train.main(config_of(settings)))
