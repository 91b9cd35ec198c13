"""How training data and benchmark are prepared: which rows, which text, and what identifies it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import PIL
from tokenizers import Tokenizer

from nanovlm.config.schema import TrainConfig
from nanovlm.data.benchmark import benchmark_items
from nanovlm.data.build import Recipe
from nanovlm.data.build_text import RowText
from nanovlm.data.cache import PreparedFolder
from nanovlm.data.rows import BadValue
from nanovlm.data.samples import (
    encode_prompts,
    encode_turns,
    mmstar_prompt,
    training_answer,
)
from nanovlm.data.sources import benchmark_source, training_source

VERSION = 2
"""Of the bytes that are prepared. A test holds them against a digest: raise this when they change,
so that data which an earlier version has prepared is not taken for this one's."""

ROW_ORDER_SEED = 0
"""Rows are shuffled the same way in every run: the cut-off and the validation rows depend on it."""


def training_recipe(config: TrainConfig, tokenizer: Tokenizer) -> Recipe:
    """Return how the training rows of `config` become samples, in the order of the shuffled rows.

    Raises UserError if a sub-set is not there.
    """
    source = training_source(config.train_dataset_path, config.train_dataset_name)
    recipe = _recipe("training data", source.identity, config, tokenizer)
    recipe |= {
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
        folder=PreparedFolder.of(recipe, path=config.train_dataset_path),
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
    place = f"test_dataset_path={config.test_dataset_path!r}"
    source = benchmark_source(config.test_dataset_path)
    recipe = _recipe("benchmark", source.identity, config, tokenizer)
    return Recipe(
        what="benchmark",
        folder=PreparedFolder.of(recipe, path=config.test_dataset_path),
        load=source.load,
        order=np.arange,
        text_column="question",
        encode=lambda questions: _encode_questions(questions, tokenizer),
        image_column="image",
        image_size=config.vlm.vit_img_size,
        resampling=config.vlm.image_resampling,
        max_bad_fraction=0.0,
        is_whole=True,
        items=partial(benchmark_items, place),
    )


def _recipe(
    what: str,
    identity: Mapping[str, Any],
    config: TrainConfig,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Return everything that the prepared bytes depend on in training data and benchmark alike."""
    return {
        "what": what,
        "source": identity,
        "version": VERSION,
        "pillow": PIL.__version__,
        "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        "vit_img_size": config.vlm.vit_img_size,
        "image_resampling": config.vlm.image_resampling,
    }


Turn = Mapping[str, str | None]


def _encode_turns(
    rows: Sequence[Sequence[Turn | None] | BadValue | None],
    config: TrainConfig,
    tokenizer: Tokenizer,
) -> list[RowText]:
    read = [_turns(row, 1 if config.turns == "first" else None) for row in rows]
    wanted = [[] if isinstance(row, BadValue) else row for row in read]
    complete = [list(_complete_turns(row)) for row in wanted]
    together = [turn for row in complete for turn in row]  # the tokenizer works on many at once
    vlm = config.vlm
    encoded = iter(encode_turns(tokenizer, together, vlm.lm_eos_token_id, vlm.lm_max_length))
    result = []
    for row, all_turns, turns in zip(read, wanted, complete, strict=True):
        fitting = [turn for turn in islice(encoded, len(turns)) if turn is not None]
        result.append(
            RowText(
                tokens=[turn.tokens for turn in fitting],
                prompt_lengths=[turn.num_prompt_tokens for turn in fitting],
                num_turns=len(all_turns),
                num_over_long=len(turns) - len(fitting),
                num_incomplete=len(all_turns) - len(turns),
                problem=row.reason if isinstance(row, BadValue) else None,
            )
        )
    return result


def _turns(
    row: Sequence[Turn | None] | BadValue | None, number: int | None
) -> list[Turn] | BadValue:
    """Return the first `number` turns of a row, or why they cannot be read."""
    if isinstance(row, BadValue):
        return row
    first = list(row or ())[:number]
    turns = [turn for turn in first if turn is not None]
    if len(turns) < len(first):
        return BadValue(f"turn {first.index(None)} is null")
    return turns


def _complete_turns(row: Sequence[Turn]) -> Iterator[tuple[str, str]]:
    for turn in row:
        user, assistant = turn["user"], turn["assistant"]
        if user is not None and assistant is not None and training_answer(assistant).strip():
            yield user, assistant


def _encode_questions(questions: Sequence[str], tokenizer: Tokenizer) -> list[RowText]:
    prompts = encode_prompts(tokenizer, [mmstar_prompt(question) for question in questions])
    return [RowText([prompt], [len(prompt)], 1) for prompt in prompts]
