"""Tokenizers by name, and what a model must have in common with one."""

import json
from collections.abc import Collection

from tokenizers import AddedToken, Tokenizer

from nanovlm.config.schema import VLMConfig
from nanovlm.data.digits import BUILTIN_DIGITS, digits_tokenizer
from nanovlm.data.digits_tiles import BUILTIN_DIGITS_TILES, digits_tiles_tokenizer
from nanovlm.errors import UserError
from nanovlm.tokenizer_files import chat_template, eos_token_id, read_tokenizer, setting

BUILTIN = {BUILTIN_DIGITS: digits_tokenizer, BUILTIN_DIGITS_TILES: digits_tiles_tokenizer}


def load_tokenizer(name: str, placeholders: Collection[str] = ()) -> Tokenizer:
    """Return the tokenizer `name`: one of `BUILTIN`, a folder with tokenizer.json, or a hub id.

    Args:
        placeholders: what stands for images in the texts of other programs (`vlm_extra_tokens`).
            Here the image stands before the text, so none of them is a token, even if the files
            have it: in a text it is text like any other.

    Raises:
        UserError: there is no such tokenizer, or the hub cannot be reached.
    """
    if name in BUILTIN:
        return BUILTIN[name]()
    tokenizer = read_tokenizer(name)
    if any(tokenizer.token_to_id(token) is not None for token in placeholders):
        return _without_tokens(tokenizer, placeholders, name)
    return tokenizer


def model_tokenizer(vlm: VLMConfig) -> Tokenizer:
    """Return the tokenizer of a model, in 8k with the extra tokens at their ids.

    Raises:
        UserError: as `load_tokenizer`, or the extra tokens cannot have their ids.
    """
    if not vlm.traits.is_tiled:
        return load_tokenizer(vlm.lm_tokenizer, vlm.vlm_extra_tokens.values())
    ids, tokenizer = _extra_token_ids(vlm), load_tokenizer(vlm.lm_tokenizer)
    # Tokens that the files have keep their ids, others follow the last one in this order.
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ids])
    for token, expected in ids.items():
        if (number := tokenizer.token_to_id(token)) != expected:
            raise UserError(
                f"{setting(vlm.lm_tokenizer)}: {token} must have the id {expected}, but would have "
                f"{number}: the {len(ids)} extra tokens of generation {vlm.generation} follow all "
                f"others and fill up vlm.lm_vocab_size={vlm.lm_vocab_size}"
            )
    return tokenizer


def model_chat_template(vlm: VLMConfig) -> str:
    """Return the text in Jinja that makes conversations of messages for a model of 8k.

    Raises:
        UserError: neither the configuration nor the tokenizer has one.
    """
    template = vlm.lm_chat_template
    if template is None:
        template = chat_template(vlm.lm_tokenizer)
    if template is None:
        raise UserError(
            f"{setting(vlm.lm_tokenizer)}: has no chat template, which models of generation "
            f"{vlm.generation} need: set vlm.lm_chat_template, for instance as "
            f"nanovlm/config/presets/{vlm.traits.preset}.yaml has it"
        )
    return template


def _extra_token_ids(vlm: VLMConfig) -> dict[str, int]:
    """Return the extra tokens that stand in tokenized texts, with the ids that they must have.

    None does in v0.2.
    """
    tokens = vlm.vlm_extra_tokens.values() if vlm.traits.is_tiled else ()
    return {token: number for number, token in enumerate(tokens, vlm.lm_base_vocab_size)}


def _without_tokens(tokenizer: Tokenizer, unwanted: Collection[str], name: str) -> Tokenizer:
    """Return the tokenizer without these added tokens; all others keep their numbers."""
    content = json.loads(tokenizer.to_str())
    added = content["added_tokens"]
    content["added_tokens"] = [token for token in added if token["content"] not in unwanted]
    result = Tokenizer.from_str(json.dumps(content))
    expected = tokenizer.get_vocab(with_added_tokens=True)
    if result.get_vocab(with_added_tokens=True).items() - expected.items():
        raise UserError(
            f"{setting(name)}: {', '.join(unwanted)} must be the last of its added tokens, or "
            "their numbers would shift without it"
        )
    return result


def check_tokens(vlm: VLMConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model cannot read some token, or if EOS is not what ends a text.

    What counts is the largest id: a tokenizer of few tokens may number them with gaps.
    """
    messages = []
    name = setting(vlm.lm_tokenizer)
    tokens = tokenizer.get_vocab(with_added_tokens=True).items()
    largest = max((number for _, number in tokens - _extra_token_ids(vlm).items()), default=-1)
    if largest >= vlm.lm_base_vocab_size:
        messages.append(
            f"vlm.lm_vocab_size{vlm.traits.less_extra_tokens} must be above all token ids of "
            f"{name}, got {vlm.lm_vocab_size} and ids up to {largest}"
        )
    special = {n: t.content for n, t in tokenizer.get_added_tokens_decoder().items() if t.special}
    if vlm.lm_eos_token_id not in special:
        token = tokenizer.id_to_token(vlm.lm_eos_token_id)
        what = "no token" if token is None else f"{token!r}, which is text,"
        choices = ", ".join(f"{number} ({text})" for number, text in list(special.items())[:10])
        messages.append(
            f"vlm.lm_eos_token_id must be a special token, got {vlm.lm_eos_token_id}: {what} in "
            f"{name}. Choices: {choices or 'none; mark one in its added_tokens'}"
        )
    elif vlm.traits.takes_eos_from_tokenizer:
        messages += _eos_problems(vlm)
    if messages:
        raise UserError(*messages)


def _eos_problems(vlm: VLMConfig) -> list[str]:
    """Return what is wrong with an EOS that a saved model will take from its tokenizer."""
    theirs = eos_token_id(vlm.lm_tokenizer)
    if theirs == vlm.lm_eos_token_id:
        return []
    name = setting(vlm.lm_tokenizer)
    what = "which names none" if theirs is None else f"which is {theirs}"
    return [
        f"vlm.lm_eos_token_id must be the eos_token of {name}, {what}, in models of generation "
        f"{vlm.generation}: their files do not hold it; got {vlm.lm_eos_token_id}"
    ]
