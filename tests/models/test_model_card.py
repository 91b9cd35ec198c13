"""The model card: its metadata parses, and its text says what is known and nothing else."""

from typing import Any

import pytest
from huggingface_hub import ModelCard

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.hub import Score, model_card

SCORE = Score(accuracy=0.3532, interval_95=(0.3291, 0.3784), num_items=1500)


def card(config: VLMConfig | None = None, **details: Any) -> ModelCard:
    return ModelCard(model_card("me/vlm", config or VLMConfig(), 222_081_600, **details))


def test_the_metadata() -> None:
    bases = ["google/siglip-base-patch16-224", "HuggingFaceTB/SmolLM2-135M"]
    data = card(base_models=bases, datasets=["HuggingFaceM4/the_cauldron"]).data.to_dict()
    assert data == {
        "library_name": "nanovlm",
        "pipeline_tag": "image-text-to-text",
        "tags": ["nanovlm", "vision-language-model"],
        "base_model": bases,
        "datasets": ["HuggingFaceM4/the_cauldron"],
    }
    assert not {"base_model", "datasets"} & card().data.to_dict().keys()


@pytest.mark.parametrize(
    "text",
    [
        "# vlm\n",
        "| parameters | 222,081,600 |",
        "| 12 blocks, width 768, 12 heads; 224 x 224 pixels in patches of 16 x 16 |",
        "| projector | pixel shuffle 2: 49 tokens an image |",
        "30 blocks, width 576, 9 query heads on 3 key-value heads, 49,152 tokens |",
        "| tokenizer | `HuggingFaceTB/cosmo2-tokenizer` |",
        "starts from `google/siglip-base-patch16-224` and `HuggingFaceTB/SmolLM2-135M`.",
        "python -m nanovlm generate --checkpoint me/vlm --image",
        'VisionLanguageModel.from_pretrained("me/vlm")',
    ],
)
def test_the_model_and_its_use(text: str) -> None:
    assert text in card().text


def test_the_generation_stands_there() -> None:
    assert "| generation | nanoVLM v0.1 |" in card().text
    config = VLMConfig(generation="v0.2", lm_vocab_size=49_153, lm_max_length=512)
    text = card(config).text
    assert "| generation | nanoVLM v0.2 |" in text
    assert "49,153 tokens, `<|image|>` included |" in text


def test_tiles_and_conversations_stand_there() -> None:
    training = build_config(preset_layer("nanovlm-460m-8k"))
    text = card(training.vlm, training=training).text
    assert "answer questions about images, one after the other. Training" in text
    assert "; images up to 2048 x 2048 in tiles of 512 x 512 pixels in patches of 16" in text
    assert "| pixel shuffle 4: 64 tokens a tile |" in text
    assert "49,218 tokens, `<|image|>` and 65 more extra tokens included |" in text
    assert "| `max_images_per_example` | `4` |" in text
    assert "max_images" not in card(training=TrainConfig()).text


def test_training_and_evaluation_stand_there_if_they_are_known() -> None:
    training = TrainConfig(lr_mp=0.003, train_dataset_name=("ai2d", "tqa"))
    text = card(training=training, score=SCORE).text
    assert "| `lr_mp` | `0.003` |" in text and "| `epochs` | `5` |" in text
    assert "Sub-sets of the training data: ai2d, tqa." in text
    assert "`mmstar_accuracy` on `Lin-Chen/MMStar`: **0.353**" in text
    assert "95 % interval 0.329 to 0.378\n(1,500 questions)" in text
    assert "wandb" not in text
    assert "## Evaluation" not in card(training=training).text
    assert "## Training" not in card().text


def test_random_weights_are_called_so() -> None:
    text = card(VLMConfig(vlm_load_backbone_weights=False)).text
    assert "starts from random weights" in text and "siglip-base" not in text
