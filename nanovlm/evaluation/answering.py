"""What a saved model answers to questions that another program asks: any text, with any image.

    model = SavedModel.load("results/digits/best")
    model.answers([Question("Which digit is this?", lambda: image, "row 0")], Decoding())

The other program brings questions and rules; the wording around a question, the preparation of the
image and the decoding are those of this project. Questions of similar length are read together,
packed into one row, so no answer depends on the questions beside it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from nanovlm.data.images import resize_to_uint8, to_rgb
from nanovlm.data.text import encode, mmstar_prompt, training_answer, training_prompt
from nanovlm.data.tokenizer import check_tokens, model_tokenizer
from nanovlm.downloads import find_folder
from nanovlm.errors import UserError
from nanovlm.evaluation.mmstar import AUTO_BATCH
from nanovlm.models.checkpoint import MODEL_FILES
from nanovlm.models.packing import Packing, pack
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.results.remote import is_uri, local_copy
from nanovlm.training.forward import evaluating, image_input, mixed_precision, unless_out_of_memory

Precision = Literal["auto", "float32", "bfloat16"]
"""Of matrix products; weights are float32. `auto` is that of the project's own evaluation."""

Prompt = Literal["training", "mmstar"]
"""The wording around a question: that of training, or that of the project's own MMStar."""
_WORDINGS = {"training": training_prompt, "mmstar": mmstar_prompt}

Images = Literal["one", "first"]
"""What is taken of a question's images; see `only_image`."""

BatchSize = int | Literal["auto"]
OnDone = Callable[[int], None]
"""Called with the number of questions that have just been answered."""
T = TypeVar("T")
Item = TypeVar("Item")


def ignore(number: int) -> None:
    """Take no notice."""


def find_model(setting: str, name: str) -> Path:
    """Return the local folder of the model `name`: a folder, a hub id, or a URI of a bucket.

    Args:
        setting: the one that holds `name`, for messages.

    Raises:
        UserError: there is no such model.
    """
    place = str(local_copy(setting, name)) if is_uri(name) else name
    return find_folder(setting, place, MODEL_FILES)


class Question(NamedTuple):
    """A text about one image."""

    text: str
    image: Callable[[], Image.Image]
    """Called when the question is asked, since thousands of images do not fit into memory."""
    place: str
    """Where it comes from, for messages."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How long an answer is; it is always the likeliest token that follows."""

    max_new_tokens: int = 128
    until: tuple[str, ...] = ()
    """Texts of which each ends the answer and is no part of it."""

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Self:
        """Return what generation keywords such as those of transformers ask for.

        Raises:
            UserError: they ask for random draws or for beams, or a value has the wrong type.
        """
        wanted = keywords.get("max_new_tokens", cls.max_new_tokens)
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
            raise UserError(f"max_new_tokens: must be a whole number above 0, got {wanted!r}")
        temperature = keywords.get("temperature")
        draws = keywords.get("do_sample", bool(temperature)) and temperature != 0
        if draws or (keywords.get("num_beams") or 1) != 1:
            names = ("do_sample", "temperature", "num_beams")
            given = ", ".join(f"{name}={keywords[name]}" for name in names if name in keywords)
            raise UserError(
                f"generation_kwargs: answers are always the likeliest tokens, got {given}; "
                "--gen_kwargs do_sample=False,num_beams=1 overrides a task"
            )
        until = keywords.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        return cls(max_new_tokens=wanted, until=tuple(filter(None, stops)))

    def end(self, text: str) -> str:
        """Return the answer without what follows its end, and without white space around it."""
        for stop in self.until:
            text = text.partition(stop)[0]
        return text.strip()


class SavedModel:
    """A model that was saved, its tokenizer, and how it computes."""

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        *,
        precision: Precision = "auto",
        prompt: Prompt = "training",
        batch_size: BatchSize = "auto",
    ) -> None:
        """Take a model where it is.

        Args:
            prompt: the wording around a question.
            batch_size: questions at a time; `auto` takes as many as are fast, fewer where the
                GPU's memory is too small.

        Raises:
            UserError: tokenizer and model do not belong together.
        """
        check_tokens(model.config, tokenizer)
        self.model, self.tokenizer, self.device = model, tokenizer, model.MP.proj.weight.device
        self._precision, self._word = precision, _WORDINGS[prompt]
        self._may_halve = batch_size == "auto"
        self._size = AUTO_BATCH[self.device.type] if batch_size == "auto" else batch_size

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu", **options: Any) -> Self:
        """Load the model `name`: a folder such as results/digits/best, a hub id, or a URI.

        Args:
            options: those of the constructor.

        Raises:
            UserError: there is no such model, or it cannot be used.
        """
        model = VisionLanguageModel.from_pretrained(find_model("pretrained", name)).to(device)
        return cls(model, model_tokenizer(model.config), **options)

    def answers(
        self, questions: Sequence[Question], decoding: Decoding, on_done: OnDone = ignore
    ) -> list[str]:
        """Return the answer to each question.

        An answer ends where the model has no positions left, at the latest.

        Raises:
            UserError: a question is too long for the model, or cannot be encoded.
        """
        prompts = self._prompts(questions)
        items = list(zip(questions, prompts, strict=True))
        answer = partial(self._answer, decoding)
        return self._in_batches(items, lambda item: len(item[1]), answer, on_done)

    def continuations(
        self, asked: Sequence[tuple[Question, str]], on_done: OnDone = ignore
    ) -> list[tuple[float, bool]]:
        """Return of each continuation the mean of -log p over its tokens, natural logarithm, and
        whether they are the likeliest ones.

        Raises:
            UserError: as `answers`; or there is no token in a continuation.
        """
        prompts = self._prompts([question for question, _ in asked])
        endings = encode(self.tokenizer, [training_answer(text).lstrip() for _, text in asked])
        items = []
        for (question, text), prompt, ending in zip(asked, prompts, endings, strict=True):
            if not ending:
                raise UserError(f"{question.place}: there is no token in {text!r} to weigh")
            self._check_room(question, len(prompt) + len(ending))
            items.append((question, prompt, ending))
        return self._in_batches(
            items, lambda item: len(item[1]) + len(item[2]), self._weigh, on_done
        )

    def _prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        prompts = encode(self.tokenizer, [self._word(question.text) for question in questions])
        for question, prompt in zip(questions, prompts, strict=True):
            self._check_room(question, len(prompt) + 1)
        return prompts

    def _check_room(self, question: Question, num_text: int) -> None:
        config = self.model.config
        if config.num_image_tokens + num_text > config.lm_max_position_embeddings:
            raise UserError(
                f"{question.place}: {config.num_image_tokens} image tokens + {num_text} of "
                "question and answer exceed the model's "
                f"lm_max_position_embeddings={config.lm_max_position_embeddings}"
            )

    def _in_batches(
        self,
        items: Sequence[Item],
        length: Callable[[Item], int],
        compute: Callable[[Sequence[Item]], Sequence[T]],
        on_done: OnDone,
    ) -> list[T]:
        """Return what `compute` returns for each item; those of similar length go together."""
        order = sorted(range(len(items)), key=lambda i: length(items[i]))
        results: dict[int, T] = {}
        with evaluating(self.model), self._autocast():
            while len(results) < len(items):
                chosen = order[len(results) : len(results) + self._size]
                batch = [items[i] for i in chosen]
                done = self._unless_too_many(partial(compute, batch), len(batch))
                if done is None:
                    self._size = -(-len(batch) // 2)
                else:
                    results |= zip(chosen, done, strict=True)
                    on_done(len(done))
        return [results[i] for i in range(len(items))]

    def _unless_too_many(self, compute: Callable[[], T], number: int) -> T | None:
        if self._may_halve and number > 1:
            return unless_out_of_memory(compute, f"{number} questions at a time")
        return compute()

    def _autocast(self) -> torch.autocast:
        if self._precision == "auto":
            return mixed_precision(self.device)
        bfloat16 = self._precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16)

    def _pixels(self, questions: Iterable[Question]) -> Tensor:
        config = self.model.config
        images = [
            resize_to_uint8(to_rgb(question.image()), config.vit_img_size, config.image_resampling)
            for question in questions
        ]
        uint8 = torch.stack([torch.from_numpy(image) for image in images])
        return image_input(uint8.to(self.device), config)

    def _answer(self, decoding: Decoding, batch: Sequence[tuple[Question, list[int]]]) -> list[str]:
        questions, prompts = zip(*batch, strict=True)
        config = self.model.config
        longest = max(map(len, prompts))
        room = config.lm_max_position_embeddings - config.num_image_tokens - longest
        num_new = min(decoding.max_new_tokens, room)
        token_ids, packing = _row(prompts, config.num_image_tokens, self.device)
        prefill = self.model.prefill(token_ids, self._pixels(questions), packing, num_new)
        tokens = self.model.complete(prefill, num_new).tolist()
        eos = config.lm_eos_token_id
        ended = [row[: row.index(eos)] if eos in row else row for row in tokens]
        return [decoding.end(text) for text in self.tokenizer.decode_batch(ended)]

    def _weigh(
        self, batch: Sequence[tuple[Question, list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        questions, prompts, endings = zip(*batch, strict=True)
        texts = [prompt + ending for prompt, ending in zip(prompts, endings, strict=True)]
        token_ids, packing = _row(texts, self.model.config.num_image_tokens, self.device)
        hidden = self.model.hidden_states(token_ids, self._pixels(questions), packing)
        results, first = [], 0
        for prompt, ending, text in zip(prompts, endings, texts, strict=True):
            before = hidden[first + len(prompt) - 1 : first + len(text) - 1]
            first += len(text)
            with torch.autocast(self.device.type, enabled=False):
                logits = self.model.decoder.head(before.float())
            wanted = torch.tensor(ending, device=self.device)
            loss = F.cross_entropy(logits, wanted).item()
            results.append((loss, bool((logits.argmax(dim=1) == wanted).all())))
        return results


def only_image(visuals: Sequence[Any] | None, place: str, images: Images) -> Image.Image:
    """Return the image of a question that comes with `visuals`.

    Args:
        images: `one` refuses every other number; `first` takes the first of several and a black
            image where there is none, as nanoVLM v0.1 does.

    Raises:
        UserError: it is refused, or is no image.
    """
    found = list(visuals or ())
    if images == "one" and len(found) != 1:
        raise UserError(
            f"{place}: has {len(found)} images, and the model reads exactly one with each "
            "question; model_args images=first takes the first, or black where there is none"
        )
    if not found:
        return Image.new("RGB", (1, 1))
    if not isinstance(found[0], Image.Image):
        kind = type(found[0]).__name__
        raise UserError(f"{place}: must come with an image, got a {kind} (a video or a sound?)")
    return found[0]


def _row(
    texts: Sequence[Sequence[int]], num_image_tokens: int, device: torch.device
) -> tuple[Tensor, Packing]:
    """Return texts as one row of tokens, int64[M], and their packing."""
    token_ids = torch.tensor([token for text in texts for token in text] + [0])  # one of padding
    lengths = torch.tensor([len(text) for text in texts])
    packing = pack(lengths, num_image_tokens, len(token_ids))
    return token_ids.to(device), packing.to(device)
