"""How training data and benchmark are prepared: which rows, which text, and what identifies it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import PIL
from tokenizers import Tokenizer

from nanovlm.config import TrainConfig
from nanovlm.data.build import Recipe
from nanovlm.data.build_text import RowText
from nanovlm.data.cache import PreparedFolder
from nanovlm.data.rows import Subset
from nanovlm.data.samples import encode_prompts, encode_turns, mmstar_prompt
from nanovlm.data.sources import benchmark_source, training_source

VERSION = 1
"""Of the bytes that are prepared. A test holds them against a digest: raise this when they change,
so that data which an earlier version has prepared is not taken for this one's."""

ROW_ORDER_SEED = 0
"""Rows are shuffled the same way in every run: the cut-off and the validation rows depend on it."""


def training_recipe(config: TrainConfig, tokenizer: Tokenizer) -> Recipe:
    """Return how the training rows of `config` become samples, in the order of the shuffled rows.

    Raises UserError if a sub-set is not there.
    """
    source = training_source(config.train_dataset_path, config.train_dataset_name)
    about = _about("training data", config.train_dataset_path, source.identity, config, tokenizer)
    about |= {
        "data_cutoff_idx": config.data_cutoff_idx,
        "turns": config.turns,
        "lm_max_length": config.vlm.lm_max_length,
        "lm_eos_token_id": config.vlm.lm_eos_token_id,
    }

    def order(num_rows: int) -> np.ndarray:
        shuffled = np.random.default_rng(ROW_ORDER_SEED).permutation(num_rows)
        return shuffled[: config.data_cutoff_idx]

    return Recipe(
        what="training data",
        folder=PreparedFolder.of(about),
        load=source.load,
        order=order,
        text_column="texts",
        encode=lambda rows: _encode_turns(rows, config, tokenizer),
        image_column="images",
        image_size=config.vlm.vit_img_size,
        resampling=config.vlm.image_resampling,
        max_bad_fraction=config.max_bad_fraction,
    )


def benchmark_recipe(config: TrainConfig, tokenizer: Tokenizer) -> Recipe:
    """Return how the benchmark's questions become prompts, in its order.

    Raises UserError if it is not there.
    """
    source = benchmark_source(config.test_dataset_path)
    about = _about("benchmark", config.test_dataset_path, source.identity, config, tokenizer)
    return Recipe(
        what="benchmark",
        folder=PreparedFolder.of(about),
        load=source.load,
        order=np.arange,
        text_column="question",
        encode=lambda questions: _encode_questions(questions, tokenizer),
        image_column="image",
        image_size=config.vlm.vit_img_size,
        resampling=config.vlm.image_resampling,
        max_bad_fraction=0.0,
        items=_benchmark_items,
    )


def _about(
    what: str,
    path: str,
    identity: Mapping[str, Any],
    config: TrainConfig,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Return everything that the prepared bytes depend on in training data and benchmark alike."""
    return {
        "what": what,
        "path": path,
        "source": identity,
        "version": VERSION,
        "pillow": PIL.__version__,
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "vit_img_size": config.vlm.vit_img_size,
        "image_resampling": config.vlm.image_resampling,
    }


def _encode_turns(
    rows: Sequence[Sequence[Mapping[str, str | None]] | None],
    config: TrainConfig,
    tokenizer: Tokenizer,
) -> list[RowText]:
    wanted = [list(row or ())[: 1 if config.turns == "first" else None] for row in rows]
    complete = [list(_complete_turns(row)) for row in wanted]
    together = [turn for row in complete for turn in row]  # the tokenizer works on many at once
    vlm = config.vlm
    encoded = iter(encode_turns(tokenizer, together, vlm.lm_eos_token_id, vlm.lm_max_length))
    result = []
    for all_turns, turns in zip(wanted, complete, strict=True):
        fitting = [turn for turn in islice(encoded, len(turns)) if turn is not None]
        result.append(
            RowText(
                tokens=[turn.tokens for turn in fitting],
                prompt_lengths=[turn.num_prompt_tokens for turn in fitting],
                num_turns=len(all_turns),
                num_over_long=len(turns) - len(fitting),
                num_incomplete=len(all_turns) - len(turns),
            )
        )
    return result


def _complete_turns(row: Sequence[Mapping[str, str | None]]) -> Iterator[tuple[str, str]]:
    for turn in row:
        user, assistant = turn["user"], turn["assistant"]
        if user is not None and assistant is not None:
            yield user, assistant


def _encode_questions(questions: Sequence[str], tokenizer: Tokenizer) -> list[RowText]:
    prompts = encode_prompts(tokenizer, [mmstar_prompt(question) for question in questions])
    return [RowText([prompt], [len(prompt)], 1) for prompt in prompts]


def _benchmark_items(subsets: Sequence[Subset]) -> dict[str, list[Any]]:
    return {
        column: [
            value
            for subset in subsets
            for group in subset.groups
            for value in group.read(column, np.arange(group.num_rows))
        ]
        for column in ("index", "answer", "category", "l2_category")
    }
