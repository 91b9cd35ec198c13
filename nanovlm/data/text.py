"""The text of rows as token ids: prompts, turns of question and answer, and parts of a data set."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from nanovlm.data.cache import PreparedFolder
from nanovlm.data.rows import BadValue, Chosen
from nanovlm.errors import UserError
from nanovlm.files import replacing

_PROMPT_END = "Answer:"
_BATCH_TEXTS = 10_000  # an encoding holds far more than the ids that are kept
_SAMPLES_PER_COPY = 100_000  # an index takes 8 bytes a token

Turn = Mapping[str, str | None]
"""`user` and `assistant`."""

LOW_RATED: Turn = {"user": None, "assistant": None}
"""Stands for a turn that is left out since its rating is too low."""


class TiledText(NamedTuple):
    """What a row with tiled images has besides; at most one sample."""

    is_learnt: Sequence[bool] = ()
    """Of each token of the sample."""
    tile_places: Sequence[int] = ()
    """How many tokens of the sample stand before each tile."""
    image_tiles: Sequence[int] = ()
    """The tiles of each image of the sample."""
    has_too_many_images: bool = False
    num_image_tokens_removed: int = 0
    """From the row's own text."""
    bad_column: str | None = None
    """The one that cannot be read, if it is not that of the text."""


class RowText(NamedTuple):
    """The samples of one row."""

    tokens: list[list[int]]
    """Of each sample: prompt, and in training answer and EOS."""
    prompt_lengths: list[int]
    """Tokens of each prompt; those after it are learnt."""
    num_turns: int
    num_over_long: int = 0
    num_incomplete: int = 0
    """Turns without a question or without an answer."""
    num_low_rated: int = 0
    problem: str | None = None
    """Why the row cannot be read; then it has no samples."""
    tiles: TiledText | None = None
    """What there is besides, where images are tiled."""

    @property
    def counts(self) -> tuple[int, ...]:
        """What `COUNTS` names."""
        tiles = self.tiles or TiledText()
        return (
            *(self.num_turns, self.num_over_long, self.num_incomplete, self.num_low_rated),
            *(tiles.has_too_many_images, tiles.num_image_tokens_removed),
        )


COUNTS = ("turns", "over_long_turns", "incomplete_turns", "low_rated_turns")
"""What is counted in each row, as the manifest calls it."""
TILED_COUNTS = (*COUNTS, "rows_with_too_many_images", "removed_image_tokens")
"""The same where images are tiled."""


def training_prompt(user: str) -> str:
    """Return what precedes the answer in training (nanoVLM v0.1's wording)."""
    return f"Question: {user} {_PROMPT_END}"


def mmstar_prompt(question: str) -> str:
    """Return what precedes the answer in the benchmark (nanoVLM v0.1's wording and spacing)."""
    return f"Question: {question} \nAnswer only with the letter! \n{_PROMPT_END}"


def mmstar_message(question: str) -> str:
    """Return what the user says in the benchmark where texts are conversations (lmms-eval's wording
    for MMStar)."""
    asked = question.strip().replace(" Please answer yes or no.", "")
    return f"{asked}\nAnswer with the option's letter from the given choices directly"


def training_answer(assistant: str) -> str:
    """Return what is learnt after the prompt.

    The multiple-choice sets of the_cauldron answer `Answer: D`. The prompt ends with that word
    already; a model that learnt to repeat it would score near zero by MMStar's rules, which read
    the letter first.
    """
    answer = assistant.removeprefix(_PROMPT_END)
    return assistant if answer == assistant else answer.lstrip()


def read_rated_turns(
    rows: Chosen, column: str, least: Mapping[str, int]
) -> Iterator[Sequence[Turn | None] | BadValue | None]:
    """Yield the turns of each row, with `LOW_RATED` in the place of those that are rated too low.

    A turn without a rating stays, as it does in nanoVLM.

    Args:
        least: by the kind of rating; the column `KIND_ratings` holds one for each turn.
    """
    columns = [rows.read(f"{kind}_ratings") for kind in least]
    for turns, *ratings in zip(rows.read(column), *columns, strict=True):
        yield _without_low_ratings(turns, dict(zip(least, ratings, strict=True)), least)


def _without_low_ratings(
    turns: Sequence[Turn | None] | BadValue | None,
    ratings: Mapping[str, Sequence[int | None] | None],
    least: Mapping[str, int],
) -> Sequence[Turn | None] | BadValue | None:
    if turns is None or isinstance(turns, BadValue):
        return turns
    for kind, given in ratings.items():
        if given is None:
            continue
        if len(given) != len(turns):
            return BadValue(f"{kind}_ratings has {len(given)} values for {len(turns)} turns")
        turns = [
            turn if rating is None or rating >= least[kind] else LOW_RATED
            for turn, rating in zip(turns, given, strict=True)
        ]
    return turns


def encode_turns(
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[Turn | None] | BadValue | None],
    eos_token_id: int,
    max_length: int,
    max_turns: int | None = None,
) -> list[RowText]:
    """Return the samples of each row: its turns as prompt, answer and EOS.

    Prompt and answer are encoded apart: generation starts from the prompt alone, so training must
    not see a token that joins the prompt's end with the answer's beginning.

    Args:
        max_length: turns of more tokens are left out.
        max_turns: of each row; None takes all.
    """
    read = [read_turns(row, max_turns) for row in rows]
    flat = [pair for pairs, *_ in read for pair in pairs]  # the tokenizer works on many together
    prompts = encode(tokenizer, [training_prompt(user) for user, _ in flat])
    answers = encode(tokenizer, [training_answer(assistant) for _, assistant in flat])
    encoded = zip(prompts, answers, strict=True)
    result = []
    for pairs, num_turns, num_low_rated, problem in read:
        samples = [
            ([*prompt, *answer, eos_token_id], len(prompt))
            for prompt, answer in islice(encoded, len(pairs))
        ]
        fitting = [sample for sample in samples if len(sample[0]) <= max_length]
        result.append(
            RowText(
                tokens=[tokens for tokens, _ in fitting],
                prompt_lengths=[length for _, length in fitting],
                num_turns=num_turns,
                num_over_long=len(samples) - len(fitting),
                num_incomplete=num_turns - num_low_rated - len(pairs),
                num_low_rated=num_low_rated,
                problem=problem,
            )
        )
    return result


def encode_questions(tokenizer: Tokenizer, questions: Sequence[str]) -> list[RowText]:
    """Return each question of the benchmark as a prompt alone."""
    prompts = encode(tokenizer, [mmstar_prompt(question) for question in questions])
    return [RowText([prompt], [len(prompt)], 1) for prompt in prompts]


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of each text, with no special tokens.

    Raises:
        UserError: the tokenizer has no token for a part of a text.
    """
    ids: list[list[int]] = []
    for start in range(0, len(texts), _BATCH_TEXTS):
        some = texts[start : start + _BATCH_TEXTS]
        try:
            encoded = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        except Exception as error:  # the library raises no other type
            raise UserError(f"vlm.lm_tokenizer: cannot encode a text: {error}") from error
        ids += [e.ids for e in encoded]
    return ids


def read_turns(
    row: Sequence[Turn | None] | BadValue | None, max_turns: int | None
) -> tuple[list[tuple[str, str]], int, int, str | None]:
    """Return question and answer of the turns that have both, the number of turns, of those rated
    too low, and why the row cannot be read."""
    if isinstance(row, BadValue):
        return [], 0, 0, row.reason
    turns = list(row or ())[:max_turns]
    pairs = []
    for number, turn in enumerate(turns):
        if turn is None:
            return [], 0, 0, f"turn {number} is null"
        user, assistant = turn["user"], turn["assistant"]
        if user is not None and assistant is not None and training_answer(assistant).strip():
            pairs.append((user, assistant))
    return pairs, len(turns), sum(turn is LOW_RATED for turn in turns), None


ReadRows = Callable[[Chosen, str], Iterator[Any]]
"""From rows and the name of the text column to a value for each row."""
EncodeRows = Callable[[Sequence[Any]], list[RowText]]
"""From these values to the samples of each row."""


class EncodedText(NamedTuple):
    """N samples of M rows, in the order of the rows."""

    tokens: np.ndarray
    """int32[all tokens], one sample after the other."""
    lengths: np.ndarray
    """int32[N]"""
    prompt_lengths: np.ndarray
    """int32[N]"""
    rows: np.ndarray
    """int64[N], the row of each sample, counted through the chosen rows."""
    counts: np.ndarray
    """int64[M, 6], `TILED_COUNTS` of each row."""
    bad_rows: np.ndarray
    """int64[K], the rows that cannot be read, counted through the chosen rows."""
    bad_columns: np.ndarray
    """str[K], which column; empty for that of the text."""
    reasons: np.ndarray
    """str[K], why not."""
    is_learnt: np.ndarray
    """bool[all tokens]; this and what follows is empty where images are not tiled."""
    num_tiles: np.ndarray
    """int32[N]"""
    tile_places: np.ndarray
    """int32[all tiles], how many tokens of the sample stand before each tile."""
    image_tiles: np.ndarray
    """int32[all images], the tiles of each image."""


def encode_part(
    part: Sequence[Chosen], column: str, read: ReadRows, encode: EncodeRows
) -> EncodedText:
    """Return the samples of consecutive groups' rows."""
    rows = encode([value for some in part for value in read(some, column)])
    samples = [sample for row in rows for sample in row.tokens]
    problems = [(i, row.problem) for i, row in enumerate(rows) if row.problem is not None]
    tiled = [row.tiles for row in rows if row.tiles and row.tokens]
    first = part[0].first

    def all_of(values: Iterable[Sequence[int]], kind: type[np.generic]) -> np.ndarray:
        return np.fromiter(chain.from_iterable(values), kind)

    return EncodedText(
        tokens=all_of(samples, np.int32),
        lengths=np.fromiter(map(len, samples), np.int32),
        prompt_lengths=all_of((row.prompt_lengths for row in rows), np.int32),
        rows=np.repeat(first + np.arange(len(rows)), [len(row.tokens) for row in rows]),
        counts=np.array([row.counts for row in rows], np.int64).reshape(-1, len(TILED_COUNTS)),
        bad_rows=first + np.array([i for i, _ in problems], np.int64),
        bad_columns=np.array(
            [(rows[i].tiles or TiledText()).bad_column or "" for i, _ in problems], np.str_
        ),
        reasons=np.array([reason for _, reason in problems], np.str_),
        is_learnt=all_of((tiles.is_learnt for tiles in tiled), np.bool_),
        num_tiles=np.array([len(tiles.tile_places) for tiles in tiled], np.int32),
        tile_places=all_of((tiles.tile_places for tiles in tiled), np.int32),
        image_tiles=all_of((tiles.image_tiles for tiles in tiled), np.int32),
    )


def encode_text(
    parts: Sequence[Sequence[Chosen]],
    column: str,
    read: ReadRows,
    encode: EncodeRows,
    folder: Path,
    on_rows: Callable[[int], None],
) -> EncodedText:
    """Return the samples of all parts as one.

    Args:
        parts: rows that are encoded together, and written to one file.
        folder: where the parts are kept.
        on_rows: called with the number of rows that are done.
    """
    encoded, done = [], 0
    for number, part in enumerate(parts):
        file = folder / f"text-{number:05}.npz"
        if not file.exists():
            with replacing(file) as part_file, part_file.open("wb") as stream:
                np.savez(stream, **encode_part(part, column, read, encode)._asdict())
        with np.load(file) as arrays:
            encoded.append(EncodedText(**arrays))
        done += sum(len(some.rows) for some in part)
        on_rows(done)
    return EncodedText(*map(np.concatenate, zip(*encoded, strict=True)))


def write_samples(folder: PreparedFolder, text: EncodedText, samples: np.ndarray) -> None:
    """Write the arrays `tokens`, `offsets` and `prompt_lengths` of these samples in this order."""
    starts = np.cumsum(text.lengths, dtype=np.int64) - text.lengths
    offsets = offsets_of(text.lengths[samples])
    tokens = np.empty(offsets[-1], np.int32)
    for part, places in _places(starts, text.lengths, samples):
        tokens[part] = text.tokens[places]
    folder.write_array("tokens", tokens)
    folder.write_array("offsets", offsets)
    folder.write_array("prompt_lengths", text.prompt_lengths[samples].astype(np.int64))


def write_tiles(folder: PreparedFolder, text: EncodedText, samples: np.ndarray) -> None:
    """Write the arrays `is_learnt` of the tokens, and `tile_index`, `tile_offsets` and
    `tile_places` of these samples in this order.

    The tiles of all samples of `text` are numbered one after the other.
    """
    starts = np.cumsum(text.lengths, dtype=np.int64) - text.lengths
    is_learnt = np.empty(text.lengths[samples].sum(dtype=np.int64), np.bool_)
    for part, places in _places(starts, text.lengths, samples):
        is_learnt[part] = text.is_learnt[places]
    folder.write_array("is_learnt", is_learnt)
    first_tiles = np.cumsum(text.num_tiles, dtype=np.int64) - text.num_tiles
    offsets = offsets_of(text.num_tiles[samples])
    index = np.empty(offsets[-1], np.int64)
    for part, places in _places(first_tiles, text.num_tiles, samples):
        index[part] = places
    folder.write_array("tile_index", index)
    folder.write_array("tile_offsets", offsets)
    folder.write_array("tile_places", text.tile_places[index].astype(np.int64))


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Return where each of N things of these lengths starts, and the end of all, int64[N + 1]."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _places(
    starts: np.ndarray, lengths: np.ndarray, samples: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield where in the new order some samples lie, and int64[n], the old places of all that they
    have, for a copy of all samples in new order."""
    offsets = offsets_of(lengths[samples])
    for first in range(0, len(samples), _SAMPLES_PER_COPY):
        some = samples[first : first + _SAMPLES_PER_COPY]
        begin, end = int(offsets[first]), int(offsets[first + len(some)])
        shift = starts[some] - offsets[first : first + len(some)]
        yield slice(begin, end), np.repeat(shift, lengths[some]) + np.arange(begin, end)
