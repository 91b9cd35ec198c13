"""Questions from outside as a model reads them, whatever its generation: as tokens, and pixels of
its images.

The wording around a question and the preparation of images are those of training. A model of v0.1
or v0.2 reads one image before the text. One of 8k reads any number, cut into tiles, at the
beginning of the user's message.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from nanovlm.config.schema import VLMConfig
from nanovlm.data.chat import ChatEncoder, Message
from nanovlm.data.conversations import tile_of, without_token
from nanovlm.data.images import resize_to_uint8, to_rgb
from nanovlm.data.text import (
    encode,
    mmstar_message,
    mmstar_prompt,
    training_answer,
    training_prompt,
)
from nanovlm.data.tiles import Tiling, cut_into_tiles, image_text
from nanovlm.errors import UserError
from nanovlm.models.packing import ImagePlaces, Packing, pack

Prompt = Literal["training", "mmstar"]
"""The wording around a question: that of training, or that of the project's own MMStar."""


class Question(NamedTuple):
    """A text about images."""

    text: str
    images: Callable[[], Sequence[Image.Image]]
    """Called when the question is asked, since thousands of images do not fit into memory."""
    place: str
    """Where it comes from, for messages."""


class PromptTokens(NamedTuple):
    """A question as a model reads it."""

    text: list[int]
    """Without placeholders of images."""
    places: list[int]
    """How many tokens of the text stand before each image, or each tile of one."""
    tilings: list[Tiling]
    """Of each image; none where images are not tiled."""

    def length(self, vlm: VLMConfig) -> int:
        """Return how many positions it takes."""
        return len(self.text) + len(self.places) * vlm.num_image_tokens

    def with_placeholders(self, vlm: VLMConfig) -> list[int]:
        """Return the tokens as `VisionLanguageModel.generate` takes them."""
        if not vlm.traits.is_tiled:
            return self.text
        tokens = list(self.text)
        for place in reversed(self.places):
            tokens[place:place] = [vlm.image_token_id] * vlm.num_image_tokens
        return tokens


class QuestionReader:
    """Makes tokens of questions and pixels of their images, for one model."""

    def __init__(self, vlm: VLMConfig, tokenizer: Tokenizer, prompt: Prompt = "training") -> None:
        """Take a model's configuration and its tokenizer.

        Raises UserError if the model needs a chat template, and there is none.
        """
        self._vlm, self._tokenizer, self._prompt = vlm, tokenizer, prompt
        self._chat = ChatEncoder.of(vlm, tokenizer) if vlm.traits.is_tiled else None

    def read(self, questions: Sequence[Question]) -> list[PromptTokens]:
        """Return the prompts. Where images are tiled they are opened for their sizes.

        Raises:
            UserError: a question cannot be encoded, or takes more positions than the model has.
        """
        if self._chat is None:
            word = mmstar_prompt if self._prompt == "mmstar" else training_prompt
            texts = encode(self._tokenizer, [word(question.text) for question in questions])
            prompts = [PromptTokens(tokens, [0], []) for tokens in texts]
        else:
            prompts = self._read_chat(self._chat, questions)
        for question, prompt in zip(questions, prompts, strict=True):
            self.check_room(question, prompt, 1)
        return prompts

    def _read_chat(self, chat: ChatEncoder, questions: Sequence[Question]) -> list[PromptTokens]:
        vlm, tile = self._vlm, tile_of(self._vlm)
        tilings = [[tile(*image.size) for image in question.images()] for question in questions]
        conversations = []
        for question, of_images in zip(questions, tilings, strict=True):
            text, _ = without_token(question.text, chat.image_token)
            text = mmstar_message(text) if self._prompt == "mmstar" else text
            content = image_text(of_images, vlm.vlm_extra_tokens) + text
            conversations.append([Message(role="user", content=content)])
        encoded = chat.encode(conversations, are_prompts=True)
        return [
            PromptTokens(prompt.tokens, prompt.tile_places, of_images)
            for prompt, of_images in zip(encoded, tilings, strict=True)
        ]

    def read_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Return answers as they follow prompts in training, without what ends them."""
        if self._chat is None:
            answers = [training_answer(answer) for answer in answers]
        return encode(self._tokenizer, [answer.lstrip() for answer in answers])

    def check_room(self, question: Question, prompt: PromptTokens, num_answer: int) -> None:
        """Raise UserError if the model has no positions for a prompt and so much of an answer."""
        vlm = self._vlm
        if prompt.length(vlm) + num_answer > vlm.lm_max_position_embeddings:
            raise UserError(
                f"{question.place}: {len(prompt.places) * vlm.num_image_tokens} image tokens + "
                f"{len(prompt.text) + num_answer} of question and answer exceed the model's "
                f"lm_max_position_embeddings={vlm.lm_max_position_embeddings}"
            )

    def pixels(self, asked: Sequence[tuple[Question, PromptTokens]]) -> Tensor:
        """Return all images of the questions, or all tiles: uint8[K, 3, S, S]"""
        size, resampling = self._vlm.vit_img_size, self._vlm.image_resampling
        found = [np.empty((0, 3, size, size), np.uint8)]
        for question, prompt in asked:
            images = [to_rgb(image) for image in question.images()]
            if self._chat is None:
                (image,) = images
                found.append(resize_to_uint8(image, size, resampling)[None])
            else:
                found += [
                    cut_into_tiles(image, tiling, size, resampling)
                    for image, tiling in zip(images, prompt.tilings, strict=True)
                ]
        return torch.from_numpy(np.concatenate(found))


def pack_texts(
    texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]], vlm: VLMConfig
) -> tuple[Tensor, Packing]:
    """Return texts as one row of tokens, int64[M], and their packing.

    Args:
        places: of the images of each text, as in `PromptTokens`.
    """
    token_ids = torch.tensor([token for text in texts for token in text] + [0])  # one of padding
    images = ImagePlaces(
        torch.tensor([len(of_text) for of_text in places]),
        torch.tensor([place for of_text in places for place in of_text], dtype=torch.int64),
    )
    lengths = torch.tensor([len(text) for text in texts])
    return token_ids, pack(lengths, vlm.num_image_tokens, len(token_ids), images=images)
