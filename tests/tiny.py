"""The tiny model and training run that many tests share."""

import dataclasses
from typing import Any

from nanovlm.config.schema import TrainConfig, VLMConfig

VLM = VLMConfig(
    vit_hidden_dim=16,
    vit_patch_size=8,
    vit_img_size=32,
    vit_n_heads=2,
    vit_n_blocks=1,
    lm_hidden_dim=16,
    lm_inter_dim=24,
    lm_vocab_size=128,
    lm_n_heads=4,
    lm_n_kv_heads=2,
    lm_n_blocks=1,
    lm_tokenizer="builtin:digits",
    vlm_load_backbone_weights=False,
)
"""Some 8 thousand weights for the digits: 4 image tokens, 4 query heads on 2 key-value heads."""


def vlm_config(**changes: Any) -> VLMConfig:
    """Return the tiny model with some values changed."""
    return dataclasses.replace(VLM, **changes)


def digits_config(vlm: VLMConfig = VLM, **changes: Any) -> TrainConfig:
    """Return a run of one epoch on the digits of 20 training rows, on the CPU."""
    config = TrainConfig(
        epochs=1,
        data_cutoff_idx=20,
        val_ratio=0.2,
        train_dataset_path="builtin:digits",
        train_dataset_name=("default",),
        test_dataset_path="builtin:digits",
        compile=False,
        log_wandb=False,
        vlm=vlm,
    )
    return dataclasses.replace(config, **changes)
