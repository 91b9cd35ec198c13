"""Random samples of the 8k generation: tiles amid texts of very different lengths."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovlm.data.samples import ImageSlots, PreparedSamples
from nanovlm.models.vision_language_model import IGNORED_TARGET
from tests.tiny import vlm_config

VLM = vlm_config(
    generation="8k",
    vit_patch_size=4,
    vit_img_size=8,
    max_img_size=32,
    lm_vocab_size=98,
    lm_max_length=256,
    lm_max_position_embeddings=256,
)
"""One image token a tile; 66 of the tokens are the generation's own."""

NUM_TEXT_TOKENS = 32


class Sample(NamedTuple):
    """One sample as nanoVLM reads it, with placeholders."""

    input_ids: list[int]
    targets: list[int]
    tiles: list[int]
    """Its images, in order."""


def tiled_samples(number: int = 24, seed: int = 0) -> tuple[PreparedSamples, list[Sample]]:
    """Return samples of 3 to 60 text tokens and none to six tiles, and the same as nanoVLM's."""
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    tokens, learnt, index, places, whole = [], [], [], [], []
    for _ in range(number):
        length = int(rng.choice([3, 5, 12, 60]))
        text = rng.integers(1, NUM_TEXT_TOKENS, length).tolist()
        is_learnt = [False, *(rng.random(length - 2) < 0.4).tolist(), True]
        own = sorted(rng.integers(0, length, rng.integers(0, 7)).tolist())
        tiles = rng.integers(0, len(images), len(own)).tolist()
        tokens.append(text)
        learnt.append(is_learnt)
        index.append(tiles)
        places.append(own)
        whole.append(_with_placeholders(text, is_learnt, own, tiles))
    slots = ImageSlots(_flat(index), _offsets(index), _flat(places))
    prepared = PreparedSamples(
        images=images,
        slots=slots,
        tokens=_flat(tokens).int(),
        offsets=_offsets(tokens),
        prompt_lengths=torch.tensor([is_learnt.index(True) for is_learnt in learnt]),
        is_learnt=_flat(learnt).bool(),
    )
    return prepared, whole


def _with_placeholders(
    text: list[int], is_learnt: list[bool], places: list[int], tiles: list[int]
) -> Sample:
    ids, labels = [], []
    for column, (token, learns) in enumerate(zip(text, is_learnt, strict=True)):
        for _ in range(places.count(column)):
            ids.append(VLM.image_token_id)
            labels.append(IGNORED_TARGET)
        ids.append(token)
        labels.append(token if learns else IGNORED_TARGET)
    # A learnt token behind a tile is foretold by the text token in front of the tile, not by it.
    targets = [IGNORED_TARGET] * len(ids)
    texts = [i for i, token in enumerate(ids) if token != VLM.image_token_id]
    for before, after in pairwise(texts):
        targets[before] = labels[after]
    last = texts[-1]
    return Sample(ids[:last], targets[:last], tiles)


def _flat(rows: list[list[int]] | list[list[bool]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.int64)


def _offsets(rows: list[list[int]]) -> Tensor:
    return torch.tensor([0, *np.cumsum([len(row) for row in rows]).tolist()])
