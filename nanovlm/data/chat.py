"""Conversations as token ids, by the chat template of a tokenizer.

The text is transformers' own rendering, its tokens those of the whole text. Images stand in it as
one image token for each tile (`nanovlm.data.tiles.image_text`); these are taken out again, since
the model puts the output of the vision encoder there.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import compress, takewhile
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from tokenizers import Encoding, Tokenizer

from nanovlm.config.generations import V8K
from nanovlm.config.schema import VLMConfig
from nanovlm.data.tokenizer import model_chat_template
from nanovlm.errors import UserError
from nanovlm.tokenizer_files import setting, special_tokens

if TYPE_CHECKING:  # it takes a second to import, and what is prepared needs none of it
    from transformers import PreTrainedTokenizerFast

_BATCH_CONVERSATIONS = 1000  # an encoding holds far more than the ids that are kept

Span = tuple[int, int]
"""Start and end of a part of a text, in characters."""


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    """`user`, `assistant` or `system`."""
    content: str


Conversation = Sequence[Message]


class EncodedChat(NamedTuple):
    """A conversation for the model."""

    tokens: list[int]
    """Without image tokens."""
    is_learnt: list[bool]
    """Of each token: whether it belongs to an assistant's message, after what asks for that and
    through what ends it."""
    tile_places: list[int]
    """How many tokens stand before each tile."""


class ChatEncoder:
    """Encodes conversations for a model of tiled images."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        image_token: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        setting: str = "vlm.lm_chat_template",
    ) -> None:
        """Keep what is given; nothing is rendered.

        Args:
            tokenizer: which has the image token.
            template: in Jinja.
            special_tokens: what else the template may name, such as `bos_token`.
            setting: what messages call the template.
        """
        self.template, self.image_token = template, image_token
        self.special_tokens = dict(special_tokens or {})
        self._tokenizer, self._setting = tokenizer, setting

    @classmethod
    def of(cls, vlm: VLMConfig, tokenizer: Tokenizer) -> "ChatEncoder":
        """Return the encoder of a model. Raises UserError if there is no chat template."""
        is_own = vlm.lm_chat_template is not None
        return cls(
            tokenizer,
            model_chat_template(vlm),
            vlm.vlm_extra_tokens["image_token"],
            special_tokens=special_tokens(vlm.lm_tokenizer),
            setting="vlm.lm_chat_template"
            if is_own
            else f"the chat template of {setting(vlm.lm_tokenizer)} (vlm.lm_chat_template: null)",
        )

    def encode(
        self, conversations: Sequence[Conversation], *, are_prompts: bool = False
    ) -> list[EncodedChat]:
        """Return each conversation as tokens.

        Args:
            are_prompts: of prompts nothing is learnt, and they end with what asks for an answer.

        Raises:
            UserError: the template cannot render one, not as its messages one after the other, or
                without an image; or the tokenizer has no token for a part of it.
        """
        encoded: list[EncodedChat] = []
        for start in range(0, len(conversations), _BATCH_CONVERSATIONS):
            some = conversations[start : start + _BATCH_CONVERSATIONS]
            if are_prompts:
                rendered = [
                    (self._render(messages, is_prompt=True), list[Span]()) for messages in some
                ]
            else:
                rendered = [self._text_and_spans(messages) for messages in some]
            encoded += self._encoded(some, rendered)
        return encoded

    def _text_and_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the text, and where in it what is learnt lies."""
        text = self._render(conversation)
        spans = []
        for number, message in enumerate(conversation):
            if message["role"] == "assistant":
                prompt = self._render(conversation[:number], is_prompt=True)
                is_last = number + 1 == len(conversation)
                answered = text if is_last else self._render(conversation[: number + 1])
                self._check_joins(prompt, answered)
                self._check_joins(answered, text)
                spans.append((len(prompt), len(answered)))
        return text, spans

    def _render(self, conversation: Conversation, is_prompt: bool = False) -> str:
        try:
            text = self._renderer.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in conversation],
                tokenize=False,
                add_generation_prompt=is_prompt,
            )
        except Exception as error:  # a template can raise anything
            roles = ", ".join(message["role"] for message in conversation)
            raise UserError(
                f"{self._setting}: cannot make a text of the messages of {roles}: {error}"
            ) from error
        assert isinstance(text, str)
        return text

    @cached_property
    def _renderer(self) -> "PreTrainedTokenizerFast":
        from transformers import PreTrainedTokenizerFast

        renderer = PreTrainedTokenizerFast(tokenizer_object=self._tokenizer, **self.special_tokens)
        renderer.chat_template = self.template
        return renderer

    def _check_joins(self, part: str, whole: str) -> None:
        """Raise UserError if a conversation does not begin with the text of its first messages."""
        if whole.startswith(part):
            return
        pairs = zip(part, whole, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        near = slice(max(0, same - 20), same + 20)
        raise UserError(
            f"{self._setting}: must give a conversation as its messages one after the other, each "
            f"answer after what asks for it, or nobody knows which tokens are learnt. It gives "
            f"...{part[near]!r} of the first messages alone and ...{whole[near]!r} of more; ChatML "
            f"(nanovlm/config/presets/{V8K.preset}.yaml) is a template that joins"
        )

    def _encoded(
        self, conversations: Sequence[Conversation], rendered: Sequence[tuple[str, list[Span]]]
    ) -> Iterator[EncodedChat]:
        texts = [text for text, _ in rendered]
        try:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises no other type
            raise UserError(f"vlm.lm_tokenizer: cannot encode a text: {error}") from error
        image_token_id = self._tokenizer.token_to_id(self.image_token)
        assert image_token_id is not None, f"{self.image_token} must be a token"
        for conversation, encoding, (_, learnt) in zip(
            conversations, encodings, rendered, strict=True
        ):
            encoded = _without_image_tokens(encoding, learnt, image_token_id)
            num_tiles = sum(m["content"].count(self.image_token) for m in conversation)
            if len(encoded.tile_places) != num_tiles:
                raise UserError(
                    f"{self._setting}: gives {len(encoded.tile_places)} of a conversation's "
                    f"{num_tiles} {self.image_token}; it must keep each message's content as it is"
                )
            yield encoded


def _without_image_tokens(
    encoding: Encoding, learnt: Sequence[Span], image_token_id: int
) -> EncodedChat:
    ids = encoding.ids
    starts = [start for start, _ in encoding.offsets]
    is_learnt = [False] * len(ids)
    for span in learnt:
        first, end = (bisect_left(starts, at) for at in span)
        is_learnt[first:end] = [True] * (end - first)
    tiles = [place for place, number in enumerate(ids) if number == image_token_id]
    if not tiles:
        return EncodedChat(ids, is_learnt, [])
    is_text = [number != image_token_id for number in ids]
    places = [place - before for before, place in enumerate(tiles)]
    return EncodedChat([*compress(ids, is_text)], [*compress(is_learnt, is_text)], places)
