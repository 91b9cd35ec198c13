"""Rows as conversations about tiled images: each row is one sample, with all its turns and images.

How many tokens an image becomes depends on its size, so the headers of the images are read beside
the texts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from nanovlm.config.schema import VLMConfig
from nanovlm.data.build_images import images_of
from nanovlm.data.chat import ChatEncoder, EncodedChat, Message
from nanovlm.data.images import UnreadableImage, image_size
from nanovlm.data.rows import BadValue, Chosen
from nanovlm.data.text import ReadRows, RowText, TiledText, mmstar_message, read_turns
from nanovlm.data.tiles import Tiling, image_text, tile_image

Tile = Callable[[int, int], Tiling]
"""From width and height of an image to its grid."""


class ChatRow(NamedTuple):
    """A row as it is read."""

    text: Any
    """Its turns, or in the benchmark its question."""
    tilings: Sequence[Tiling] | BadValue | None
    """Of its images; None if it has too many."""


def tile_of(vlm: VLMConfig) -> Tile:
    """Return how a model of tiled images divides an image."""
    assert vlm.max_img_size is not None, f"{vlm.generation} has no tiles"
    return partial(
        tile_image,
        tile_size=vlm.vit_img_size,
        max_size=vlm.max_img_size,
        resize_to_max_size=vlm.resize_to_max_side_len,
    )


def read_chat_rows(
    rows: Chosen,
    column: str,
    *,
    read_text: ReadRows,
    image_column: str,
    tile: Tile,
    max_images: int | None = None,
) -> Iterator[ChatRow]:
    """Yield each row. Of its images only the headers are read, and none is kept.

    Args:
        max_images: of a row; None for any number.
    """
    for text, images in zip(read_text(rows, column), rows.read(image_column), strict=True):
        yield ChatRow(text, _tilings(images, tile, max_images))


def _tilings(images: Any, tile: Tile, max_images: int | None) -> list[Tiling] | BadValue | None:
    try:
        listed = images_of(images)
        if max_images is not None and len(listed) > max_images:
            return None
        return [tile(*image_size(image)) for image in listed]
    except UnreadableImage as error:
        return BadValue(str(error))


class _Read(NamedTuple):
    """What becomes of a row before anything is encoded."""

    row_text: RowText
    """Counts, and why it has no sample."""
    messages: Sequence[Message] = ()
    """Empty if the row has no sample."""
    tilings: Sequence[Tiling] = ()


def encode_chats(
    chat: ChatEncoder,
    rows: Sequence[ChatRow],
    *,
    tokens: Mapping[str, str],
    num_image_tokens: int,
    max_length: int,
    image_column: str,
    max_turns: int | None = None,
) -> list[RowText]:
    """Return the sample of each row: its turns one after the other, its images before the first.

    Args:
        tokens: spelling of the extra tokens by name.
        num_image_tokens: of a tile.
        max_length: conversations with more tokens, those of all tiles included, are left out.
        image_column: what a bad image is reported under.
        max_turns: of each row; None takes all.
    """
    read = [_read_row(row, tokens, image_column, max_turns) for row in rows]
    encoded = iter(chat.encode([one.messages for one in read if one.messages]))
    return [
        _sample(one, next(encoded), num_image_tokens, max_length) if one.messages else one.row_text
        for one in read
    ]


def encode_mmstar_messages(
    chat: ChatEncoder, rows: Sequence[ChatRow], *, tokens: Mapping[str, str], image_column: str
) -> list[RowText]:
    """Return each question of the benchmark as a prompt alone: a conversation of one message."""
    read = [_read_question(row, tokens, image_column) for row in rows]
    prompts = iter(chat.encode([one.messages for one in read if one.messages], are_prompts=True))
    return [_with_sample(one, next(prompts)) if one.messages else one.row_text for one in read]


def _read_row(
    row: ChatRow, tokens: Mapping[str, str], image_column: str, max_turns: int | None
) -> _Read:
    pairs, num_turns, num_low_rated, problem = read_turns(row.text, max_turns)
    counted = RowText(
        [],
        [],
        num_turns,
        num_incomplete=num_turns - num_low_rated - len(pairs),
        num_low_rated=num_low_rated,
        problem=problem,
    )
    if not pairs:
        return _Read(counted)
    if row.tilings is None:
        return _Read(counted._replace(tiles=TiledText(has_too_many_images=True)))
    if isinstance(row.tilings, BadValue):
        return _Read(_bad_image(counted, row.tilings.reason, image_column))
    texts = [text for pair in pairs for text in pair]
    return _conversation(counted, texts, row.tilings, tokens)


def _read_question(row: ChatRow, tokens: Mapping[str, str], image_column: str) -> _Read:
    counted = RowText([], [], num_turns=1)
    if isinstance(row.tilings, BadValue):
        return _Read(_bad_image(counted, row.tilings.reason, image_column))
    if not row.tilings:
        return _Read(_bad_image(counted, "no image", image_column))
    return _conversation(counted, [mmstar_message(row.text)], row.tilings, tokens)


def _bad_image(counted: RowText, reason: str, image_column: str) -> RowText:
    return counted._replace(problem=reason, tiles=TiledText(bad_column=image_column))


def _conversation(
    counted: RowText, texts: Sequence[str], tilings: Sequence[Tiling], tokens: Mapping[str, str]
) -> _Read:
    """Return messages of user and assistant in turn, free of image tokens but for the images."""
    cleaned = [without_token(text, tokens["image_token"]) for text in texts]
    num_removed = sum(number for _, number in cleaned)
    contents = [text for text, _ in cleaned]
    contents[0] = image_text(tilings, tokens) + contents[0]
    roles = ("user", "assistant")
    messages = [Message(role=roles[i % 2], content=text) for i, text in enumerate(contents)]
    tiles = TiledText(num_image_tokens_removed=num_removed)
    return _Read(counted._replace(tiles=tiles), messages, tilings)


def without_token(text: str, token: str) -> tuple[str, int]:
    """Return a text without a token, and how often it was there, also once others are gone."""
    num_removed = 0
    while number := text.count(token):
        text, num_removed = text.replace(token, ""), num_removed + number
    return text, num_removed


def _sample(one: _Read, encoded: EncodedChat, num_image_tokens: int, max_length: int) -> RowText:
    row = one.row_text
    num_turns = len(one.messages) // 2
    if not any(encoded.is_learnt):
        return row._replace(num_incomplete=row.num_incomplete + num_turns)
    if len(encoded.tokens) + num_image_tokens * len(encoded.tile_places) > max_length:
        return row._replace(num_over_long=num_turns)
    return _with_sample(one, encoded)


def _with_sample(one: _Read, encoded: EncodedChat) -> RowText:
    is_learnt = encoded.is_learnt
    prompt_length = is_learnt.index(True) if True in is_learnt else len(is_learnt)
    tiles = one.row_text.tiles or TiledText()
    return one.row_text._replace(
        tokens=[encoded.tokens],
        prompt_lengths=[prompt_length],
        tiles=tiles._replace(
            is_learnt=is_learnt,
            tile_places=encoded.tile_places,
            image_tiles=[tiling.num_tiles for tiling in one.tilings],
        ),
    )
