"""Direct preference optimisation from a JSONL file with the cookbook's trainer, on OpenMinT.

Each line of the file is {"comparison": {"prompt_conversation": [...], "completion_A": [...],
"completion_B": [...]}, "label": "A" or "B"}. The file here prefers a helpful library desk to a rude
one. The run's own start is the frozen reference; the loss is computed in the client and sent as a
custom loss. Watch `accuracy`, `margin` and `dpo_loss` in <log_path>/metrics.jsonl.

    cd DATA/client                       # tokenizers lie here under the names of their bases
    export TINKER_BASE_URL=http://127.0.0.1:8411 TINKER_API_KEY=$(cat ../admin.key)
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
    python .../examples/cookbook/dpo_jsonl.py log_path=/tmp/dpo_jsonl

Any field of Settings may follow as name=value. See docs/cookbook.md.
"""

from pathlib import Path

import chz
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

DATA = Path(__file__).resolve().parent / "data"


@chz.chz
class Settings:
    log_path: str
    train_path: str = str(DATA / "library_desk.jsonl")
    model_name: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    renderer_name: str = "role_colon"
    load_checkpoint_path: str | None = None
    lora_rank: int = 16
    learning_rate: float = 3e-4
    dpo_beta: float = 0.1
    batch_size: int = 8
    num_epochs: int = 2
    max_length: int = 256


def config_of(settings: Settings) -> train_dpo.Config:
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=settings.model_name,
        renderer_name=settings.renderer_name,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
    )
    return train_dpo.Config(
        recipe_name="dpo_jsonl",
        log_path=settings.log_path,
        model_name=settings.model_name,
        renderer_name=settings.renderer_name,
        load_checkpoint_path=settings.load_checkpoint_path,
        dataset_builder=DPODatasetBuilderFromComparisons(
            common_config=common,
            comparison_builder=ComparisonBuilderFromJsonl(train_path=settings.train_path),
        ),
        lora_rank=settings.lora_rank,
        learning_rate=settings.learning_rate,
        dpo_beta=settings.dpo_beta,
        num_epochs=settings.num_epochs,
        save_every=0,
    )


if __name__ == "__main__":
    train_dpo.main(config_of(chz.entrypoint(Settings)))
