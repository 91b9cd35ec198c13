"""Any saved model as a model of lmms-eval, which asks it the questions of many benchmarks.

    python -m lmms_eval --model nanovlm_search --model_args pretrained=results/digits/best \\
        --tasks mmstar --batch_size auto --output_path results/digits/lmms --log_samples

Only lmms-eval imports this module: it finds `manifest` by the entry point `lmms_eval.models` of the
installed package. docs/howto.md says how to install both. Written against lmms-eval 0.7.3.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from nanovlm.errors import ErrorCollector, UserError, did_you_mean
from nanovlm.evaluation.answering import (
    BatchSize,
    Decoding,
    Images,
    Precision,
    SavedModel,
    take_images,
)
from nanovlm.evaluation.questions import Prompt, Question
from nanovlm.training.forward import find_device

MODEL_ID = "nanovlm_search"
"""Its name there; `nanovlm` is a model of LMMs-Lab, of another architecture."""

ARGUMENTS = ("pretrained", "dtype", "prompt", "images", "max_new_tokens")
"""Of `--model_args`; device and batch size have options of their own."""


def manifest() -> Any:
    """Return what lmms-eval registers, a ModelManifest."""
    from lmms_eval.models.registry_v2 import ModelManifest  # its package calls this when imported

    path = f"{LmmsEvalModel.__module__}.{LmmsEvalModel.__qualname__}"
    return ModelManifest(model_id=MODEL_ID, simple_class_path=path)


class LmmsEvalModel(lmms):
    """A saved model, which answers what lmms-eval asks.

    What cannot be used ends the program with one message: lmms-eval would print a traceback and
    exit with code 0.
    """

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = None,
        batch_size: str | int | None = "auto",
        max_batch_size: int | None = None,
        dtype: Precision = "auto",
        prompt: Prompt = "training",
        images: Images | None = None,
        max_new_tokens: int = 128,
        **unknown: Any,
    ) -> None:
        """Load the model.

        Args:
            pretrained: a folder, a hub id or a URI.
            device: `cuda` is the GPU of this process; None takes a GPU where there is one.
            batch_size: questions at a time, or `auto`.
            max_batch_size: of `auto`.
            dtype: of matrix products: `auto`, `float32` or `bfloat16`.
            prompt: the wording around a question: that of `training`, or that of the project's own
                MMStar, `mmstar`.
            images: `one`, `first` or, for models of generation 8k, `all`; see `take_images`. None
                takes `all` for these and `one` for others.
            max_new_tokens: the longest answer where a task does not say.
        """
        super().__init__()
        with _one_message():
            problems = ErrorCollector()
            with problems:
                _check_names(pretrained, unknown)
            with problems:
                _check_choice("dtype", dtype, Precision)
            with problems:
                _check_choice("prompt", prompt, Prompt)
            with problems:
                _check_choice("images", images or "one", Images)
            with problems:
                Decoding.of({"max_new_tokens": max_new_tokens})
            with problems:
                size = _batch_size(batch_size, max_batch_size)
            with problems:
                self.device = find_device("--device", _device_of_process(device))
            problems.raise_if_any()
            self._longest = max_new_tokens
            self._saved = SavedModel.load(
                str(pretrained), self.device, precision=dtype, prompt=prompt, batch_size=size
            )
            self._images = _images_of(self._saved, images)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return the answer to each request."""
        by_decoding = defaultdict[Decoding, list[int]](list)
        with _one_message(), self._progress(len(requests)) as on_done:
            for i, request in enumerate(requests):
                given = {name: v for name, v in request.args[1].items() if v is not None}
                decoding = Decoding.of({"max_new_tokens": self._longest} | given)
                by_decoding[decoding].append(i)
            answers: dict[int, str] = {}
            for decoding, chosen in by_decoding.items():
                questions = [self._question(requests[i]) for i in chosen]
                answered = self._saved.answers(questions, decoding, on_done)
                answers |= zip(chosen, answered, strict=True)
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Return of each request's continuation the mean loss of a token, as lmms-eval's own models
        do: it takes the choice with the lowest number. And whether it is the likeliest one.

        Wrapped, since lmms-eval 0.7.3 makes text of a bare pair, and then fails.
        """
        with _one_message(), self._progress(len(requests)) as on_done:
            asked = [(self._question(request), self._target(request)) for request in requests]
            return [GenerationResult(pair) for pair in self._saved.continuations(asked, on_done)]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        with _one_message():
            raise UserError(f"task {requests[0].args[-2]}: the model cannot answer in rounds")

    def _question(self, request: Instance) -> Question:
        text, _, doc_to_visual, doc_id, task, split = request.args
        place = f"task {task}, document {doc_id}"

        def images() -> list[Image.Image]:
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            return take_images(visuals, place, self._images)

        return Question(text, images, place)

    def _target(self, request: Instance) -> str:
        _, target, _, doc_id, task, split = request.args
        return str(target(self.task_dict[task][split][doc_id]) if callable(target) else target)

    @contextmanager
    def _progress(self, number: int) -> Iterator[Callable[[int], Any]]:
        with tqdm(total=number, desc="Model Responding", disable=self.rank != 0) as bar:
            yield bar.update


@contextmanager
def _one_message() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{MODEL_ID}: {error}") from None


def _check_names(pretrained: str, unknown: dict[str, Any]) -> None:
    """Raise UserError if a name in `--model_args` is unknown, or the model is not named."""
    messages = [
        f"--model_args: unknown {name!r}.{did_you_mean(name, ARGUMENTS)}" for name in unknown
    ]
    if not pretrained:
        messages.append("--model_args: must name a model, as in pretrained=results/digits/best")
    if messages:
        raise UserError(*messages)


def _check_choice(name: str, value: str, literal: Any) -> None:
    choices = get_args(literal)
    if value not in choices:
        raise UserError(f"--model_args: {name} must be one of {', '.join(choices)}, got {value!r}")


def _images_of(saved: SavedModel, wanted: Images | None) -> Images:
    """Return what is taken of a question's images, by default all that the model reads."""
    vlm = saved.model.config
    if wanted == "all" and not vlm.traits.is_tiled:
        raise UserError(
            f"--model_args: images=all is for models of generation 8k; this one, of "
            f"{vlm.generation}, reads one image with each question: images=one or images=first"
        )
    return wanted or ("all" if vlm.traits.is_tiled else "one")


def _batch_size(wanted: str | int | None, limit: int | None) -> BatchSize:
    """Return questions at a time. lmms-eval allows `auto`, `auto:N` and a number."""
    text = str(wanted)
    if text.partition(":")[0] == "auto":
        return limit or "auto"
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch_size: must be auto or a whole number above 0, got {wanted!r}")
    return int(text)


def _device_of_process(name: str | None) -> str | None:
    """Return `name`, with the number of this process's GPU if there are several processes."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or name not in (None, "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{rank}"
