"""Supervised learning from a JSONL file of conversations with the cookbook's trainer, on OpenMinT.

Each line of the file is {"messages": [{"role": ..., "content": ...}, ...]}; the loss is on the
assistant's words. The file here teaches a terse form of unit conversions: "3 m = 300 cm". Watch
`train_mean_nll` and, on the held-out lines, `test/nll` in <log_path>/metrics.jsonl.

    cd DATA/client                       # tokenizers lie here under the names of their bases
    export TINKER_BASE_URL=http://127.0.0.1:8411 TINKER_API_KEY=$(cat ../admin.key)
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    python .../examples/cookbook/sl_jsonl.py log_path=/tmp/sl_jsonl

Any field of Settings may follow as name=value. See docs/cookbook.md.
"""

import asyncio
from pathlib import Path

import chz
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

DATA = Path(__file__).resolve().parent / "data"


@chz.chz
class Settings:
    log_path: str
    file_path: str = str(DATA / "units.jsonl")
    test_size: int = 8
    model_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    renderer_name: str = "role_colon"
    load_checkpoint_path: str | None = None
    lora_rank: int = 16
    learning_rate: float = 2e-3
    batch_size: int = 8
    num_epochs: int = 3
    max_length: int = 256
    eval_every: int = 5
    save_every: int = 10
    ttl_seconds: int | None = 7200
    rolling_save_every: int = 0


def config_of(settings: Settings) -> train.Config:
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=settings.model_name,
        renderer_name=settings.renderer_name,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
    )
    return train.Config(
        recipe_name="sl_jsonl",
        log_path=settings.log_path,
        model_name=settings.model_name,
        renderer_name=settings.renderer_name,
        load_checkpoint_path=settings.load_checkpoint_path,
        dataset_builder=FromConversationFileBuilder(
            common_config=common, file_path=settings.file_path, test_size=settings.test_size
        ),
        lora_rank=settings.lora_rank,
        learning_rate=settings.learning_rate,
        num_epochs=settings.num_epochs,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
        ttl_seconds=settings.ttl_seconds,
        rolling_save_every=settings.rolling_save_every,
    )


if __name__ == "__main__":
    asyncio.run(train.main(config_of(chz.entrypoint(Settings))))
