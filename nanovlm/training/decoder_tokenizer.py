"""Whether a tokenizer's ids mean to a pretrained decoder what they meant in its pretraining."""

from nanovlm.config import VLMConfig
from nanovlm.data.processors import load_tokenizer
from nanovlm.errors import UserError
from nanovlm.models.model_files import find_folder
from nanovlm.models.pretrained_config import DECODER_FILES, TOKENIZER_FILE

MAX_OTHER_TOKENS = 0.1
"""Share of the ids that may stand for other tokens: fine-tunes rename some special ones, while two
tokenizers that were trained apart agree on next to nothing."""

_KNOWN_PAIR = (VLMConfig().lm_model_type, VLMConfig().lm_tokenizer)


def check_decoder_tokenizer(vlm: VLMConfig) -> None:
    """Raise UserError if `lm_tokenizer` numbers its tokens otherwise than the decoder's own one.

    Asks nobody about the default pair, and where both go by the same name.
    """
    pair = (vlm.lm_model_type, vlm.lm_tokenizer)
    if pair == _KNOWN_PAIR or vlm.lm_model_type == vlm.lm_tokenizer:
        return
    folder = find_folder("vlm.lm_model_type", vlm.lm_model_type, DECODER_FILES)
    if not (folder / TOKENIZER_FILE).is_file():
        return  # it comes with none
    theirs = _tokens_by_id(str(folder))
    ours = _tokens_by_id(vlm.lm_tokenizer)
    common = ours.keys() & theirs.keys()
    others = sorted(number for number in common if ours[number] != theirs[number])
    if len(others) <= MAX_OTHER_TOKENS * len(common):
        return
    first = others[0]
    raise UserError(
        f"vlm.lm_tokenizer={vlm.lm_tokenizer!r} is not the tokenizer that "
        f"vlm.lm_model_type={vlm.lm_model_type!r} was trained with: {len(others)} of {len(common)} "
        f"ids stand for other tokens, {first} for {ours[first]!r} instead of {theirs[first]!r}; "
        f"leave it out, or set vlm.lm_tokenizer={vlm.lm_model_type}"
    )


def _tokens_by_id(name: str) -> dict[int, str]:
    vocabulary = load_tokenizer(name).get_vocab(with_added_tokens=True)
    return {number: token for token, number in vocabulary.items()}
