"""What a frozen vision encoder makes of each image, computed once for all who train on it.

Epochs, trials and evaluations that have the same encoder, by its weights, map one file. Images are
read in blocks of one size in their order, so the numbers do not depend on who comes first.

Shapes: R images, N patches of each, D = vit_hidden_dim.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nanovlm.config.schema import VLMConfig
from nanovlm.data.cache import ABOUT_FILE, FEATURES_FILE, MANIFEST_FILE, PreparedFolder
from nanovlm.errors import UserError
from nanovlm.files import free_bytes, gib, remove_folder, replace_text
from nanovlm.messages import BuildProgress
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import evaluating, has_bfloat16, image_input, mixed_precision

BLOCK = 32
"""Images that are read together; another number would give other bits."""
WHAT = "vision features"
VERSION = 1
"""Of the bytes."""
_BLOCKS_PER_NOTE = 16
_NOTE = "parts-features/done"
"""How many images are safe on the disk."""

OnProgress = Callable[[BuildProgress], None]


def encoder_digest(model: VisionLanguageModel) -> str:
    """Return a hash of the weights of the vision encoder, equal on every device."""
    digest = hashlib.sha256()
    for name, tensor in model.vision_encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def frozen_features(
    model: VisionLanguageModel,
    images: Tensor,
    images_key: str,
    device: torch.device,
    on_progress: OnProgress,
) -> Tensor:
    """Return the encoder's output for each image, mapped into memory: float[R, N, D].

    bfloat16 where the model computes in it, which is what the projector would round it to; else
    float32.

    Args:
        images: uint8[R, 3, S, S]
        images_key: the name of these images' prepared data.

    Raises:
        UserError: the disk is too full, or what was computed before is damaged.
    """
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    config = model.config
    shape = (len(images), config.num_patches, config.vit_hidden_dim)
    folder = PreparedFolder.of(
        {
            "what": WHAT,
            "images": images_key,
            "encoder": encoder_digest(model),
            "mean": config.image_mean,
            "std": config.image_std,
            "computed": [VERSION, BLOCK, str(dtype), torch.__version__, *_processor(device)],
        },
        path=f"images of {images_key}",
    )
    if not folder.is_complete:
        with folder.locked(lambda: on_progress(_progress("waiting", 0, 1))):
            if not folder.is_complete:  # by the one that we have waited for
                _write(folder, model, images, dtype, device, on_progress)
    stored = np.uint16 if dtype == torch.bfloat16 else np.float32  # numpy has no bfloat16
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(folder.mapped(FEATURES_FILE, shape, stored)).view(dtype)


def feature_bytes(vlm: VLMConfig, on_gpu: bool) -> int:
    """Return what the features of an image take on the disk."""
    return vlm.num_patches * vlm.vit_hidden_dim * (2 if on_gpu else 4)


def _processor(device: torch.device) -> tuple[str | int, ...]:
    """Return what the bits of a sum depend on."""
    if device.type == "cuda":
        return (torch.cuda.get_device_name(device),)
    return "cpu", torch.get_num_threads()


def _progress(stage: Literal["images", "waiting"], done: int, total: int) -> BuildProgress:
    return BuildProgress(what=WHAT, stage=stage, done=done, total=total)


def _write(
    folder: PreparedFolder,
    model: VisionLanguageModel,
    images: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: OnProgress,
) -> None:
    """Compute what is not there yet; a killed process loses a few blocks."""
    config = model.config
    image_bytes = config.num_patches * config.vit_hidden_dim * dtype.itemsize
    note, path = folder.path / _NOTE, folder.path / FEATURES_FILE
    start = int(note.read_text()) if note.exists() and path.exists() else 0
    note.parent.mkdir(parents=True, exist_ok=True)
    folder.write_json(ABOUT_FILE, folder.about)
    _check_disk(path, (len(images) - start) * image_bytes)
    with path.open("ab") as file, evaluating(model), mixed_precision(device):
        file.truncate(start * image_bytes)
        for first in range(start, len(images), BLOCK):
            pixels = image_input(images[first : first + BLOCK].to(device), config)
            features = model.vision_encoder(pixels).to(dtype).cpu()
            file.write(features.contiguous().view(torch.uint8).numpy().tobytes())
            done = min(first + BLOCK, len(images))
            if (first // BLOCK) % _BLOCKS_PER_NOTE == _BLOCKS_PER_NOTE - 1 or done == len(images):
                file.flush()
                os.fsync(file.fileno())
                replace_text(note, str(done))
                on_progress(_progress("images", done, len(images)))
    folder.write_json(MANIFEST_FILE, {"images": len(images)})
    remove_folder(note.parent)


def _check_disk(path: Path, num_bytes: int) -> None:
    free = free_bytes(path.parent)
    if num_bytes > free:
        raise UserError(
            f"cache_vision_features: the features take {gib(num_bytes)} in {path.parent.parent}, "
            f"where {gib(free)} are free; HF_ASSETS_CACHE=FOLDER puts prepared data elsewhere, "
            "`python -m nanovlm data list` shows what can go, a smaller data_cutoff_idx needs "
            "less, and without cache_vision_features there are none"
        )
