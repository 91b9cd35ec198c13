"""Accuracy on multiple-choice questions in MMStar's format, the same number at every call.

The model answers greedily, its answer ends at the first EOS, and lmms-eval's rules for MMStar
decide whether it names the right letter. The same forward pass over the prompt gives the
probability of each letter. Questions of similar length are read together, packed into
one row, so nothing is padded and no answer depends on the questions beside it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from string import ascii_uppercase
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from nanovlm.config.schema import MMStarRules, VLMConfig
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.errors import UserError
from nanovlm.evaluation.mmstar_result import ItemAnswer, MMStarResult
from nanovlm.evaluation.mmstar_rules import LONGEST_WORDING, NEWEST_RULES
from nanovlm.models.packing import ImagePlaces, pack
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import gather_objects, rank, world_size
from nanovlm.training.forward import evaluating, image_input, mixed_precision, unless_out_of_memory
from nanovlm.training.passes import evaluation_batches

MIN_NEW_TOKENS = 5
"""As many as nanoVLM v0.1 reads."""

AUTO_BATCH = {"cpu": 32, "cuda": 256}
"""Questions at a time, by the kind of device. A GPU waits for its host while there are few: on an
H200 it answers 1,350 questions a second with 256 at a time, and 300 with 32."""


def evaluate_mmstar(
    model: VisionLanguageModel,
    benchmark: PreparedBenchmark,
    tokenizer: Tokenizer,
    batch_size: int | Literal["auto"],
    device: torch.device,
    rules: MMStarRules = NEWEST_RULES,
) -> MMStarResult:
    """Ask `model` all questions; the workers share them, and each returns the whole result.

    Args:
        batch_size: questions answered at a time; `auto` takes as many as are fast, fewer where the
            GPU's memory is too small.
        rules: what counts as right, and so how much of an answer is read.

    Raises:
        UserError: the letters of the options cannot be told apart (see `letter_tokens`).
        torch.OutOfMemoryError: for one question, or with a `batch_size` that is a number.
    """
    asking = _Asking(model, benchmark, tokenizer, device, rules, may_halve=batch_size == "auto")
    batches = _batches(benchmark, model.config, batch_size, device)
    answered: dict[int, ItemAnswer] = {}
    with evaluating(model), mixed_precision(device):
        for items in batches[rank() :: world_size()]:
            answered |= zip(items.tolist(), asking.answers(items), strict=True)
    answered = {item: answer for part in gather_objects(answered) for item, answer in part.items()}
    in_order = [answered[item] for item in range(len(benchmark))]
    return MMStarResult.of(benchmark, in_order, rules)


def _batches(
    benchmark: PreparedBenchmark,
    config: VLMConfig,
    batch_size: int | Literal["auto"],
    device: torch.device,
) -> list[Tensor]:
    """Return the questions in batches, int64[B] each, of similar length: so little is padded."""
    if batch_size == "auto" and config.traits.is_tiled:
        lengths, num_images = benchmark.offsets.diff(), benchmark.slots.counts
        batches = evaluation_batches(lengths, num_images, config, device)
        return [torch.from_numpy(items) for items in batches]
    num_questions = AUTO_BATCH[device.type] if batch_size == "auto" else batch_size
    by_length = num_tokens(benchmark, config).argsort(stable=True)
    return list(by_length.split(num_questions))


def num_new_tokens(
    tokenizer: Tokenizer, letters: Sequence[str], rules: MMStarRules = NEWEST_RULES
) -> int:
    """Return how many tokens to read, so that each usual wording that counts is read whole."""
    wordings = [LONGEST_WORDING[rules].format(letter) for letter in letters]
    encoded = [tokenizer.encode(wording, add_special_tokens=False) for wording in wordings]
    return max(MIN_NEW_TOKENS, *(len(tokens) for tokens in encoded))


def check_room(benchmark: PreparedBenchmark, config: VLMConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError if the model has no positions for the longest question and its answer."""
    lengths = num_tokens(benchmark, config)
    longest = int(lengths.argmax())
    num_new = num_new_tokens(tokenizer, option_letters(benchmark))
    needed = int(lengths[longest]) + num_new
    if needed > config.lm_max_position_embeddings:
        num_image = config.num_image_tokens * int(benchmark.slots.counts[longest])
        raise UserError(
            f"vlm.lm_max_position_embeddings={config.lm_max_position_embeddings}: the question "
            f"with index {benchmark.indices[longest]} takes {needed} positions: "
            f"{num_image} of the image, {int(lengths[longest]) - num_image} of the question, "
            f"{num_new} of the answer"
        )


def num_tokens(benchmark: PreparedBenchmark, config: VLMConfig) -> Tensor:
    """Return how many tokens the decoder reads of each question, int64[N]."""
    return benchmark.offsets.diff() + config.num_image_tokens * benchmark.slots.counts


class _Asking:
    """What is the same for all batches of one evaluation."""

    def __init__(
        self,
        model: VisionLanguageModel,
        benchmark: PreparedBenchmark,
        tokenizer: Tokenizer,
        device: torch.device,
        rules: MMStarRules,
        may_halve: bool,
    ) -> None:
        tokens = letter_tokens(benchmark, tokenizer)
        self._model, self._benchmark, self._tokenizer = model, benchmark, tokenizer
        self._device = device
        self._letters = tuple(tokens)
        self._letter_tokens = torch.tensor(list(tokens.values()), device=device)
        self._num_new_tokens = num_new_tokens(tokenizer, self._letters, rules)
        self._may_halve = may_halve
        self._batch_limit = len(benchmark)

    def answers(self, items: Tensor) -> Iterator[ItemAnswer]:
        """Yield the answers to `items`, int64[B]: in parts from when memory was not enough on."""
        while len(items):
            part, rest = items[: self._batch_limit], items[self._batch_limit :]
            answer = partial(self._answer, part)
            if self._may_halve and len(part) > 1:
                answered = unless_out_of_memory(answer, f"{len(part)} questions at a time")
            else:
                answered = answer()
            if answered is None:
                self._batch_limit = -(-len(part) // 2)
            else:
                yield from answered
                items = rest

    def _answer(self, items: Tensor) -> list[ItemAnswer]:
        """Return the answers to `items`, int64[B]."""
        benchmark, model, device = self._benchmark, self._model, self._device
        prompts = [benchmark.prompt(item) for item in items.tolist()]
        token_ids = F.pad(torch.cat(prompts), (0, 1))  # one token of padding
        slots = benchmark.slots.take(items)
        packing = pack(
            torch.tensor([len(prompt) for prompt in prompts]),
            model.config.num_image_tokens,
            len(token_ids),
            images=ImagePlaces(slots.counts, slots.places),
        )
        images = benchmark.images[slots.index].to(device)
        prefill = model.prefill(
            token_ids.to(device),
            image_input(images, model.config),
            packing.to(device),
            max_new_tokens=self._num_new_tokens,
        )
        weighed = prefill.logits.float().index_select(1, self._letter_tokens).log_softmax(dim=1)
        outputs = self._texts(model.complete(prefill, self._num_new_tokens).tolist())
        return [
            self._item_answer(item, output, log_probabilities)
            for item, output, log_probabilities in zip(
                items.tolist(), outputs, weighed.tolist(), strict=True
            )
        ]

    def _texts(self, tokens: list[list[int]]) -> list[str]:
        eos = self._model.config.lm_eos_token_id
        answers = [row[: row.index(eos)] if eos in row else row for row in tokens]
        texts: list[str] = self._tokenizer.decode_batch(answers)
        return texts

    def _item_answer(self, item: int, output: str, log_probabilities: list[float]) -> ItemAnswer:
        by_letter = dict(zip(self._letters, log_probabilities, strict=True))
        return ItemAnswer(
            output=output,
            letter=max(by_letter, key=by_letter.__getitem__),
            letter_nll=-by_letter[self._benchmark.answers[item]],
        )


_LETTERS = (*ascii_uppercase,)
_MAX_LISTED = 5


def option_letters(benchmark: PreparedBenchmark) -> str:
    """Return the letters of the options: from A to the highest one that is an answer.

    Raises:
        UserError: there is no question, or an answer is no letter; lists the first ones.
    """
    wrong = [
        f"test_dataset_path: answer must be one capital letter from A, got {answer!r} "
        f"at index {index}"
        for index, answer in zip(benchmark.indices, benchmark.answers, strict=True)
        if answer not in _LETTERS
    ]
    if wrong:
        more = len(wrong) - _MAX_LISTED
        tail = [f"test_dataset_path: and {more} more answers that are no letter"]
        raise UserError(*wrong[:_MAX_LISTED], *(tail if more > 0 else []))
    if not benchmark.answers:
        raise UserError("test_dataset_path: must hold at least one question, got none")
    return ascii_uppercase[: ascii_uppercase.index(max(benchmark.answers)) + 1]


def letter_tokens(benchmark: PreparedBenchmark, tokenizer: Tokenizer) -> dict[str, int]:
    """Return the token with which an answer of each letter begins, as answers are encoded in
    training.

    Raises:
        UserError: an answer is no letter, or letters begin with the same token.
    """
    tokens: dict[str, int] = {}
    for letter in option_letters(benchmark):
        token = tokenizer.encode(letter, add_special_tokens=False).ids[0]
        for other, others_token in tokens.items():
            if token == others_token:
                raise UserError(
                    f"vlm.lm_tokenizer: an answer {letter} must begin with another token than an "
                    f"answer {other}, or they cannot be told apart; got {token} for both"
                )
        tokens[letter] = token
    return tokens
