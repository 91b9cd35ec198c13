"""The generations of nanoVLM: how their files are told apart, and how their models differ.

`VLMConfig.generation` names a row of GENERATIONS, and whatever depends on the generation asks that
row. Most does not: in v0.2 placeholders stand in the text where the image belongs, always in front,
so the decoder reads the same sequence as in v0.1, which joins both without placeholders.

Source: models/config.py and data/ of huggingface/nanoVLM at v0.1 (6ba9082) and v0.2 (731d8c6).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from nanovlm.errors import UserError

GenerationName = Literal["v0.1", "v0.2"]

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
"""What nanoVLM v0.1 and v0.2 do to images (their data/processors.py): squashed by torchvision's
default filter, values from 0 to 1. Their files have no keys for it, and they read no file with
other keys."""

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
GENERATIONS: Mapping[str, Generation] = MappingProxyType({g.name: g for g in (V01, V02)})

_LATER_KEYS = {
    "lm_chat_template": "a chat template with several turns",
    "max_img_size": "images cut into tiles",
    "resize_to_max_side_len": "images that keep their aspect ratio",
}
"""Keys of nanoVLM after v0.2, and what the models that have them need."""


def generation_of(location: str, values: Mapping[str, Any]) -> Generation:
    """Return the generation of the model whose config.json holds `values`.

    Args:
        location: of the file, for the message.

    Raises:
        UserError: the model is of a later or another generation.
    """
    known = " and ".join(map(str, GENERATIONS.values()))
    needs = [what for key, what in _LATER_KEYS.items() if key in values]
    if needs:
        raise UserError(
            f"{location}: looks like a model of a nanoVLM after v0.2, such as nanoVLM-230M-8k or "
            f"nanoVLM-460M-8k, which cannot be loaded: it needs {', '.join(needs)}. The "
            f"generations that can: {known}"
        )
    if "vlm_extra_tokens" not in values:
        return V01
    tokens = values["vlm_extra_tokens"]
    for generation in GENERATIONS.values():
        if generation.extra_tokens and tokens == dict(generation.extra_tokens):
            return generation
    raise UserError(
        f"{location}: looks like a variant of nanoVLM v0.2, which cannot be loaded: v0.2 has "
        f"vlm_extra_tokens={dict(V02.extra_tokens)}, got {tokens}. The generations that can: "
        f"{known}"
    )


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
