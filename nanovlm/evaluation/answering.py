"""What a saved model answers to questions that another program asks: any text, with any images.

    model = SavedModel.load("results/digits/best")
    model.answers([Question("Which digit is this?", lambda: [image], "row 0")], Decoding())

The other program brings questions and rules; the wording around a question, the preparation of
images (`questions.py`) and the decoding are those of this project. Questions of similar length are
read together, packed into one row, so no answer depends on the questions beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from nanovlm.data.tokenizer import check_tokens, model_tokenizer
from nanovlm.downloads import find_folder
from nanovlm.errors import UserError
from nanovlm.evaluation.mmstar import AUTO_BATCH
from nanovlm.evaluation.questions import (
    Prompt,
    PromptTokens,
    Question,
    QuestionReader,
    pack_texts,
)
from nanovlm.models.checkpoint import MODEL_FILES
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.results.remote import is_uri, local_copy
from nanovlm.training.forward import evaluating, image_input, mixed_precision, unless_out_of_memory
from nanovlm.training.passes import TILED_COSTS

Precision = Literal["auto", "float32", "bfloat16"]
"""Of matrix products; weights are float32. `auto` is that of the project's own evaluation."""

Images = Literal["one", "first", "all"]
"""What is taken of a question's images; see `take_images`."""

BatchSize = int | Literal["auto"]
OnDone = Callable[[int], None]
"""Called with the number of questions that have just been answered."""
T = TypeVar("T")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A question, and a continuation if that is to be weighed."""

    question: Question
    prompt: PromptTokens
    ending: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return self.prompt.text + self.ending


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
            UserError: tokenizer and model do not belong together, or there is no chat template.
        """
        check_tokens(model.config, tokenizer)
        self.model, self.tokenizer, self.device = model, tokenizer, model.MP.proj.weight.device
        self._reader = QuestionReader(model.config, tokenizer, prompt)
        self._precision = precision
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
        prompts = self._reader.read(questions)
        asked = [
            _Asked(question=question, prompt=prompt)
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        return self._in_batches(asked, partial(self._answer, decoding), on_done)

    def continuations(
        self, asked: Sequence[tuple[Question, str]], on_done: OnDone = ignore
    ) -> list[tuple[float, bool]]:
        """Return of each continuation the mean of -log p over its tokens, natural logarithm, and
        whether they are the likeliest ones.

        Raises:
            UserError: as `answers`; or there is no token in a continuation.
        """
        prompts = self._reader.read([question for question, _ in asked])
        endings = self._reader.read_answers([text for _, text in asked])
        items = []
        for (question, text), prompt, ending in zip(asked, prompts, endings, strict=True):
            if not ending:
                raise UserError(f"{question.place}: there is no token in {text!r} to weigh")
            self._reader.check_room(question, prompt, len(ending))
            items.append(_Asked(question=question, prompt=prompt, ending=ending))
        return self._in_batches(items, self._weigh, on_done)

    def _in_batches(
        self,
        items: Sequence[_Asked],
        compute: Callable[[Sequence[_Asked]], Sequence[T]],
        on_done: OnDone,
    ) -> list[T]:
        """Return what `compute` returns for each item; those of similar length go together."""
        vlm = self.model.config
        lengths = [item.prompt.length(vlm) + len(item.ending) for item in items]
        order = sorted(range(len(items)), key=lengths.__getitem__)
        results: dict[int, T] = {}
        with evaluating(self.model), self._autocast():
            while len(results) < len(items):
                chosen = order[len(results) : len(results) + self._size]
                batch = self._affordable([items[i] for i in chosen])
                done = self._unless_too_many(partial(compute, batch), len(batch))
                if done is None:
                    self._size = -(-len(batch) // 2)
                else:
                    results |= zip(chosen, done, strict=False)
                    on_done(len(done))
        return [results[i] for i in range(len(items))]

    def _affordable(self, items: list[_Asked]) -> list[_Asked]:
        """Return the first of the items, so many as tiles leave memory for; at least one."""
        vlm = self.model.config
        if not (self._may_halve and vlm.traits.is_tiled):
            return items
        costs = accumulate(
            item.prompt.length(vlm) + len(item.prompt.places) * vlm.num_patches for item in items
        )
        number = sum(cost <= TILED_COSTS[self.device.type] for cost in costs)
        return items[: max(1, number)]

    def _unless_too_many(self, compute: Callable[[], T], number: int) -> T | None:
        if self._may_halve and number > 1:
            return unless_out_of_memory(compute, f"{number} questions at a time")
        return compute()

    def _autocast(self) -> torch.autocast:
        if self._precision == "auto":
            return mixed_precision(self.device)
        bfloat16 = self._precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16)

    def _pixels(self, batch: Sequence[_Asked]) -> Tensor:
        uint8 = self._reader.pixels([(item.question, item.prompt) for item in batch])
        return image_input(uint8.to(self.device), self.model.config)

    def _answer(self, decoding: Decoding, batch: Sequence[_Asked]) -> list[str]:
        config = self.model.config
        longest = max(item.prompt.length(config) for item in batch)
        num_new = min(decoding.max_new_tokens, config.lm_max_position_embeddings - longest)
        prompts, places = [item.text for item in batch], [item.prompt.places for item in batch]
        token_ids, packing = pack_texts(prompts, places, config)
        prefill = self.model.prefill(
            token_ids.to(self.device), self._pixels(batch), packing.to(self.device), num_new
        )
        tokens = self.model.complete(prefill, num_new).tolist()
        eos = config.lm_eos_token_id
        ended = [row[: row.index(eos)] if eos in row else row for row in tokens]
        return [decoding.end(text) for text in self.tokenizer.decode_batch(ended)]

    def _weigh(self, batch: Sequence[_Asked]) -> list[tuple[float, bool]]:
        texts, places = [item.text for item in batch], [item.prompt.places for item in batch]
        token_ids, packing = pack_texts(texts, places, self.model.config)
        hidden = self.model.hidden_states(
            token_ids.to(self.device), self._pixels(batch), packing.to(self.device)
        )
        results, first = [], 0
        for item in batch:
            before = hidden[first + len(item.prompt.text) - 1 : first + len(item.text) - 1]
            first += len(item.text)
            with torch.autocast(self.device.type, enabled=False):
                logits = self.model.decoder.head(before.float())
            wanted = torch.tensor(item.ending, device=self.device)
            loss = F.cross_entropy(logits, wanted).item()
            results.append((loss, bool((logits.argmax(dim=1) == wanted).all())))
        return results


def take_images(visuals: Sequence[Any] | None, place: str, images: Images) -> list[Image.Image]:
    """Return the images of a question that comes with `visuals`.

    Args:
        images: `one` refuses every other number; `first` takes the first of several and a black
            image where there is none, as nanoVLM v0.1 does; `all` takes as many as there are.

    Raises:
        UserError: it is refused, or is no image.
    """
    found = list(visuals or ())
    if images == "one" and len(found) != 1:
        raise UserError(
            f"{place}: has {len(found)} images, and the model reads exactly one with each "
            "question; model_args images=first takes the first, or black where there is none"
        )
    if images == "first":
        found = found[:1] or [Image.new("RGB", (1, 1))]
    for visual in found:
        if not isinstance(visual, Image.Image):
            kind = type(visual).__name__
            raise UserError(f"{place}: must come with images, got a {kind} (a video or a sound?)")
    return found
