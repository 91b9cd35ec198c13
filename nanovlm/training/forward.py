"""From a batch to its loss: what training and evaluation share on a device."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.data.samples import Batch
from nanovlm.errors import UserError
from nanovlm.models.packing import ImagePlaces, Packing, pack
from nanovlm.models.vision_language_model import IGNORED_TARGET, VisionLanguageModel

logger = logging.getLogger(__name__)

T = TypeVar("T")


def choose_algorithms(config: TrainConfig, device: torch.device) -> None:
    """Let torch take deterministic algorithms, or the fastest ones."""
    torch.use_deterministic_algorithms(config.deterministic or device.type == "cpu")
    # Nothing here reads memory before it is written, and to fill it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # torch needs it for deterministic cuBLAS, which reads it at its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def find_device(setting: str, name: str | None) -> torch.device:
    """Return the device of that name; None takes a GPU where there is one.

    Raises UserError if it cannot be used.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # no such name; built without CUDA; no such GPU
        reason = str(error).partition("\n")[0]
        raise UserError(f"{setting}: {name!r} cannot be used: {reason}") from error
    return device


def unless_out_of_memory(compute: Callable[[], T], what: str) -> T | None:
    """Return what `compute` returns, or None if the GPU's memory is too small; then all is freed.

    Args:
        what: name of the computation, for the log.
    """
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        # As text: a kept log record would keep the error, and with it all of the pass.
        logger.warning("%s: %s", what, str(error))
    torch.cuda.empty_cache()  # only now, with the error and all that it holds gone
    return None


@contextmanager
def evaluating(model: VisionLanguageModel) -> Iterator[None]:
    """Switch `model` to evaluation without gradients, and back to the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 products on CUDA, float32 elsewhere.

    Float32 too on a GPU that has no bfloat16 in its hardware: emulated it would be slower.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


def has_bfloat16(device: torch.device) -> bool:
    """Return whether `device`, the current one if it is a GPU, multiplies bfloat16 in hardware."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def image_input(images: Tensor, config: VLMConfig) -> Tensor:
    """Return uint8[K,3,S,S] as what the vision encoder reads, float32[K,3,S,S].

    Values from 0 to 1, less the mean, divided by the standard deviation of each channel. What is no
    image but the output of a frozen encoder stays as it is.
    """
    if images.is_floating_point():
        return images
    pixels = images.float().div_(255)
    # Python numbers travel with the kernel; a tensor of them would be one more copy each step.
    for channel, mean, std in zip(
        pixels.unbind(1), config.image_mean, config.image_std, strict=True
    ):
        channel.sub_(mean).div_(std)
    return pixels


class ModelInput(NamedTuple):
    """A batch on the device of the model; see `Batch` for its shapes."""

    token_ids: Tensor
    images: Tensor
    packing: Packing
    label_index: Tensor
    """int64[L], the text tokens whose successor is learnt."""
    labels: Tensor
    """int64[L], these successors; -100 where there are fewer."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all of them, those of the packing in its place."""
        return self.token_ids, self.images, *self.packing, self.label_index, self.labels

    def apply(self, change: Callable[[Tensor], Tensor]) -> "ModelInput":
        """Return what `change` makes of each tensor."""
        token_ids, images, *packing, label_index, labels = map(change, self.tensors())
        return ModelInput(token_ids, images, Packing(*packing), label_index, labels)


def model_input(
    batch: Batch,
    config: VLMConfig,
    padded_length: int | None = None,
    num_labels: int | None = None,
) -> ModelInput:
    """Return what a model of `config` reads of a batch, still on the CPU.

    Args:
        padded_length: T of the packing; None takes what the longest sample needs.
        num_labels: L, at least as many as there are; None takes these.
    """
    num_text = len(batch.token_ids)
    label_index = (batch.targets != IGNORED_TARGET).nonzero().squeeze(1)
    labels = batch.targets[label_index]
    if num_labels is not None:  # padding points at the row's last token, which is padding
        missing = num_labels - len(labels)
        label_index = F.pad(label_index, (0, missing), value=num_text - 1)
        labels = F.pad(labels, (0, missing), value=IGNORED_TARGET)
    return ModelInput(
        token_ids=batch.token_ids,
        images=batch.images,
        packing=pack(
            batch.text_lengths,
            config.num_image_tokens,
            num_text,
            padded_length,
            ImagePlaces(batch.slots.counts, batch.slots.places),
            len(batch.images),
        ),
        label_index=label_index,
        labels=labels,
    )


def answer_loss_sum(model: VisionLanguageModel, inputs: ModelInput) -> Tensor:
    """Return the sum of the cross-entropies of all labelled tokens, float32[].

    Logits are computed at the labelled tokens alone: a prompt has many tokens, an answer few.
    """
    with mixed_precision(inputs.images.device):
        pixels = image_input(inputs.images, model.config)
        hidden = model.hidden_states(inputs.token_ids, pixels, inputs.packing)  # (M, D)
        logits = model.decoder.head(hidden.index_select(0, inputs.label_index))  # (L, V)
    return F.cross_entropy(logits.float(), inputs.labels, reduction="sum")
