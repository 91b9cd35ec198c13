"""The generations of nanoVLM: how their files are told apart, and how their models differ.

`VLMConfig.generation` names a row of GENERATIONS, and whatever depends on the generation asks that
row. Most does not: in v0.2 placeholders stand in the text where the image belongs, always in front,
so the decoder reads the same sequence as in v0.1, which joins both without placeholders. In 8k they
stand anywhere, as many as the images have tiles.

Source: models/config.py and data/ of huggingface/nanoVLM at v0.1 (6ba9082), v0.2 (731d8c6) and the
commit 4e0c096 of 2025-10-27 (8k).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from nanovlm.errors import UserError

GenerationName = Literal["v0.1", "v0.2", "8k"]

MAX_TILES_A_SIDE = 8
"""Of an image; there are no marker tokens for more rows or columns."""

DERIVED_KEYS = MappingProxyType(
    {
        "mp_image_token_length": "the image tokens that size, patches and pixel shuffle give",
        "vlm_extra_tokens": "the extra tokens of the generation",
        "extra_token_amount": "the number of the generation's extra tokens",
        "lm_base_vocab_size": "lm_vocab_size less extra_token_amount",
    }
)
"""Keys that files may have and whose values follow from others, with the rule."""

PUBLISHED_IMAGES: Mapping[str, Any] = MappingProxyType(
    {
        "image_mean": (0.0, 0.0, 0.0),
        "image_std": (1.0, 1.0, 1.0),
        "image_resampling": "bilinear",
    }
)
"""What nanoVLM does to images (its data/processors.py): squashed to the encoder's size by
torchvision's default filter, values from 0 to 1. Its files have no keys for it, and it reads no
file with other keys."""

OWN_KEYS = frozenset({"generation", *PUBLISHED_IMAGES})
"""Keys of VLMConfig that no config.json of nanoVLM has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What the models of one generation have in common."""

    name: GenerationName
    published: str
    """The model that was published."""
    preset: str
    """Its configuration, in presets/."""
    extra_tokens: Mapping[str, str] = field(default_factory=dict)
    """Tokens beyond the tokenizer's, with the last ids of the vocabulary: name and spelling."""
    length_includes_image: bool
    """Whether `lm_max_length` counts the image tokens."""
    is_tiled: bool = False
    """Whether images are cut into tiles, whose placeholders stand anywhere in the text, and texts
    are conversations; else one image stands before each text."""
    added_keys: frozenset[str] = frozenset()
    """Keys of its config.json that v0.1 has not; one that has `vlm_extra_tokens` is not v0.1's."""
    takes_eos_from_tokenizer: bool
    """Then config.json does not decide `lm_eos_token_id`, and none is written."""

    def __str__(self) -> str:
        return f"{self.name} ({self.published})"

    @property
    def less_extra_tokens(self) -> str:
        """What follows `lm_vocab_size` in messages on the room for a tokenizer's tokens."""
        amount = len(self.extra_tokens)
        return f" less {amount} extra token{'s' * (amount > 1)}" if amount else ""


V01 = Generation(
    name="v0.1",
    published="nanoVLM-222M",
    preset="nanovlm-222m",
    length_includes_image=False,
    takes_eos_from_tokenizer=False,
)
V02 = Generation(
    name="v0.2",
    published="nanoVLM-450M",
    preset="nanovlm-450m",
    extra_tokens=MappingProxyType({"image_token": "<|image|>"}),
    length_includes_image=True,
    added_keys=frozenset({*DERIVED_KEYS, "hf_repo_name"}),
    takes_eos_from_tokenizer=True,
)


def tile_marker(row: int, column: int) -> str:
    """Return the token before the tile of this row and column, counted from 1."""
    return f"<row_{row}_col_{column}>"


_SIDE = range(1, MAX_TILES_A_SIDE + 1)
TILED_KEYS = frozenset({"lm_chat_template", "max_img_size", "resize_to_max_side_len"})
"""Keys of VLMConfig for conversations and tiles."""
V8K = Generation(
    name="8k",
    published="nanoVLM-460M-8k, nanoVLM-230M-8k",
    preset="nanovlm-460m-8k",
    extra_tokens=MappingProxyType(
        {
            **V02.extra_tokens,
            "global_image_token": "<|global_image|>",
            **{f"r{row}c{column}": tile_marker(row, column) for row in _SIDE for column in _SIDE},
        }
    ),
    length_includes_image=True,
    is_tiled=True,
    added_keys=V02.added_keys | TILED_KEYS,
    takes_eos_from_tokenizer=True,
)
GENERATIONS: Mapping[str, Generation] = MappingProxyType({g.name: g for g in (V01, V02, V8K)})


def generation_of(location: str, values: Mapping[str, Any]) -> Generation:
    """Return the generation of the model whose config.json holds `values`.

    Its extra tokens tell it, names, spellings and order: the order gives their ids.

    Args:
        location: of the file, for the message.

    Raises:
        UserError: the model is a variant of a generation, with other extra tokens.
    """
    tiled = sorted(TILED_KEYS & values.keys())
    if "vlm_extra_tokens" not in values and not tiled:
        return V01
    tokens = values.get("vlm_extra_tokens")
    given = list(tokens.items()) if isinstance(tokens, Mapping) else tokens
    for generation in GENERATIONS.values():
        if generation.extra_tokens and given == list(generation.extra_tokens.items()):
            return generation
    nearest = V8K if tiled else V02
    known = ", ".join(map(str, GENERATIONS.values()))
    raise UserError(
        f"{location}: looks like a variant of nanoVLM {nearest}, which cannot be loaded: it must "
        f"have vlm_extra_tokens={_shortened(dict(nearest.extra_tokens))} in this order, got "
        f"{_shortened(tokens)}. The generations that can: {known}"
    )


def _shortened(tokens: object) -> str:
    """Return a dictionary of tokens, of which many are alike, in one line."""
    if not isinstance(tokens, Mapping) or len(tokens) <= 4:
        return str(tokens)
    first = ", ".join(f"{key!r}: {token!r}" for key, token in list(tokens.items())[:3])
    return f"{{{first}, ...}} ({len(tokens)} tokens)"


def check_file_keys(
    location: str, generation: Generation, values: Mapping[str, Any], known: frozenset[str]
) -> None:
    """Raise UserError with all keys of a config.json that are not in `known`."""
    unknown = [key for key in values if key not in known]
    if unknown:
        named = ", ".join(_with_nearest(key, known) for key in unknown)
        raise UserError(
            f"{location}: looks like a model of nanoVLM {generation}, which has no such "
            f"{'key' if len(unknown) == 1 else 'keys'}: {named}"
        )


def _with_nearest(key: str, known: frozenset[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"{key!r} (did you mean {near[0]!r}?)" if near else repr(key)
