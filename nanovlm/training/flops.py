"""How many floating-point operations training needs, counted from the configuration.

One multiply-add is 2 FLOPs. Only matrix products count: norms, activations, softmax, rotary angles
and the optimizer are left out, as is usual for model FLOP utilisation (Chowdhery et al. 2022, PaLM,
appendix B). Only useful work counts: tokens of samples and no padding, logits where a label stands,
and nothing that is computed a second time in the backward pass.

Shapes: N patches of an image or tile, D = vit_hidden_dim, F = vit_mlp_dim, P = vit_patch_size,
        f = mp_pixel_shuffle_factor, I = N / f^2 image tokens, L = lm_hidden_dim, J = lm_inter_dim,
        C = width of the keys (L x key-value heads / query heads), V = lm_vocab_size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanovlm.config.schema import TrainConfig, VLMConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Which parts of the model are trained; none in a forward pass."""

    vision_encoder: bool
    projector: bool
    decoder: bool
    """With the token embedding and the head."""


NOTHING = Trained(vision_encoder=False, projector=False, decoder=False)


def trained_parts(config: TrainConfig) -> Trained:
    """Return what `freeze` and learning rates of 0 leave to train."""
    rates = config.peak_learning_rates
    return Trained(
        vision_encoder=rates["vision_backbone"] > 0,
        projector=rates["mp"] > 0,
        decoder=rates["language_backbone"] > 0,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of each part of the model, each for one unit of what it works on."""

    vision_encoder: int
    """Of one image, or one tile of it."""
    projector: int
    """Of one image, or one tile of it."""
    decoder_token: int
    """Of one token, image or text, in all matrices of the decoder."""
    decoder_pair: int
    """Of one token and one that it looks at, itself included: a score and a weighted value."""
    head: int
    """Of one label."""
    num_image_tokens: int
    """Of one image, or one tile of it."""

    def of_samples(
        self,
        text_lengths: Sequence[int] | np.ndarray,
        num_labels: int,
        num_images: Sequence[int] | np.ndarray | int = 1,
    ) -> int:
        """Return the FLOPs of B samples that have `num_labels` labels together.

        Attention is causal: a sequence of n tokens has n (n + 1) / 2 pairs, about half of n^2.

        Args:
            text_lengths: int[B], the text tokens that each sample gives the decoder to read.
            num_images: int[B], the images of each sample, or the tiles that they are cut into.
        """
        texts = np.asarray(text_lengths, dtype=np.int64)
        images = np.broadcast_to(np.asarray(num_images, dtype=np.int64), texts.shape)
        lengths = texts + images * self.num_image_tokens
        return (
            int(images.sum()) * (self.vision_encoder + self.projector)
            + int(lengths.sum()) * self.decoder_token
            + int((lengths * (lengths + 1) // 2).sum()) * self.decoder_pair
            + num_labels * self.head
        )


def model_flops(config: VLMConfig, trained: Trained = NOTHING) -> ModelFlops:
    """Return the FLOPs of the forward pass, and of the backward pass that `trained` needs.

    A product with a matrix of weights counts once forward, once more for the gradient of the
    weights if they are trained, and once more for the gradient of its input if something before it
    is trained. The two products of attention have no weights: once forward, and twice backward
    where a gradient passes. Whether the head shares the token embedding changes nothing.
    """
    vision, projector, decoder = trained.vision_encoder, trained.projector, trained.decoder
    into_decoder = vision or projector or decoder  # by way of the token embeddings, too
    return ModelFlops(
        vision_encoder=_patch_embedding(config) * (1 + vision)
        + _vision_matrices(config) * (1 + 2 * vision)
        + _vision_attention(config) * (1 + 2 * vision),
        projector=_projector(config) * (1 + projector + vision),
        decoder_token=_decoder_matrices(config) * (1 + decoder + into_decoder),
        decoder_pair=config.lm_n_blocks * 4 * config.lm_hidden_dim * (1 + 2 * into_decoder),
        head=2 * config.lm_hidden_dim * config.lm_vocab_size * (1 + decoder + into_decoder),
        num_image_tokens=config.num_image_tokens,
    )


def _patch_embedding(config: VLMConfig) -> int:
    """2 N (3 P^2) D: the convolution; nothing ever wants the gradient of the image."""
    return 2 * config.num_patches * 3 * config.vit_patch_size**2 * config.vit_hidden_dim


def _vision_matrices(config: VLMConfig) -> int:
    """2 N (3 D^2 + D^2 + 2 D F) a block: queries, keys and values; output; MLP."""
    dim = config.vit_hidden_dim
    weights = 4 * dim**2 + 2 * dim * config.vit_mlp_dim
    return config.vit_n_blocks * 2 * config.num_patches * weights


def _vision_attention(config: VLMConfig) -> int:
    """4 N^2 D a block: every patch looks at every patch."""
    return config.vit_n_blocks * 4 * config.num_patches**2 * config.vit_hidden_dim


def _projector(config: VLMConfig) -> int:
    """2 I (f^2 D) L"""
    width = config.mp_pixel_shuffle_factor**2 * config.vit_hidden_dim
    return 2 * config.num_image_tokens * width * config.lm_hidden_dim


def _decoder_matrices(config: VLMConfig) -> int:
    """2 (2 L^2 + 2 L C + 3 L J) a block: queries and output; keys and values; SwiGLU."""
    dim = config.lm_hidden_dim
    kv_dim = dim // config.lm_n_heads * config.lm_n_kv_heads
    weights = 2 * dim**2 + 2 * dim * kv_dim + 3 * dim * config.lm_inter_dim
    return config.lm_n_blocks * 2 * weights


_H100 = "NVIDIA H100 data sheet (half of the figure with sparsity)"
_H200 = "NVIDIA H200 data sheet (half of the figure with sparsity)"
_A100 = "NVIDIA A100 data sheet"
_V100 = "NVIDIA V100 data sheet: float16, it has no bfloat16"

PEAK_TFLOPS: dict[str, tuple[float, str]] = {
    "NVIDIA B200": (2250.0, "NVIDIA HGX B200 data sheet (a sixteenth of 8 GPUs with sparsity)"),
    "NVIDIA H200": (989.4, _H200),
    "NVIDIA H200 NVL": (835.5, _H200),
    "NVIDIA H100 80GB HBM3": (989.4, f"{_H100}, SXM"),
    "NVIDIA H100 NVL": (835.5, f"{_H100}, NVL"),
    "NVIDIA H100 PCIe": (756.5, f"{_H100}, PCIe"),
    "NVIDIA A100-SXM4-80GB": (312.0, _A100),
    "NVIDIA A100-SXM4-40GB": (312.0, _A100),
    "NVIDIA A100 80GB PCIe": (312.0, _A100),
    "NVIDIA A100-PCIE-40GB": (312.0, _A100),
    "NVIDIA A10": (125.0, "NVIDIA A10 data sheet"),
    "NVIDIA L40S": (362.05, "NVIDIA L40S data sheet"),
    "NVIDIA L4": (121.0, "NVIDIA L4 data sheet (half of the figure with sparsity)"),
    "NVIDIA GeForce RTX 5090": (209.5, "NVIDIA RTX Blackwell whitepaper, float32 accumulation"),
    "NVIDIA GeForce RTX 4090": (165.2, "NVIDIA Ada whitepaper, float32 accumulation"),
    "NVIDIA GeForce RTX 3090": (71.0, "NVIDIA GA102 whitepaper, float32 accumulation"),
    "Tesla V100-SXM2-16GB": (125.0, _V100),
    "Tesla V100-SXM2-32GB": (125.0, _V100),
    "Tesla V100-PCIE-16GB": (112.0, _V100),
    "Tesla V100-PCIE-32GB": (112.0, _V100),
}
"""Dense bfloat16 products with tensor cores, in TFLOP/s, and where the figure stands; by the name
that `torch.cuda.get_device_name` gives. Names must be equal: `NVIDIA GeForce RTX 4090 D` or a MIG
slice of an A100 is another device."""


def peak_flops_per_second(device_name: str) -> float | None:
    """Return what a GPU of that name does at best, None if it is not in the table."""
    if device_name not in PEAK_TFLOPS:
        return None
    return PEAK_TFLOPS[device_name][0] * 1e12
