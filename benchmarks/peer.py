"""The peer of the benchmarks: nanoVLM as one puts it together from transformers.

SiglipVisionModel, pixel shuffle, a matrix, and LlamaForCausalLM behind them; one sample a line,
lines padded to one length, logits at every position. No code of this project takes part in it,
but its weights can be copied over, so that losses and answers can be compared.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from nanovlm.config.schema import VLMConfig
from nanovlm.models.vision_language_model import VisionLanguageModel

RENAMED = {
    "vision_encoder.": (
        ("patch_embedding.conv", "embeddings.patch_embedding"),
        ("patch_embedding.position_embedding", "embeddings.position_embedding.weight"),
        ("encoder.layer_norm", "encoder.post_layernorm"),
        ("blocks", "encoder.layers"),
        (".ln", ".layer_norm"),
        (".attn.", ".self_attn."),
    ),
    "MP.": (("MP.proj", "projector"),),
    "decoder.": (
        ("head", "lm_head"),
        ("token_embedding", "model.embed_tokens"),
        ("decoder.norm", "decoder.model.norm"),
        ("blocks", "model.layers"),
        (".norm1", ".input_layernorm"),
        (".norm2", ".post_attention_layernorm"),
        ("attn.out_proj", "attn.o_proj"),
        (".attn.", ".self_attn."),
    ),
}
"""Our names and transformers', by the part of the model; replaced one after the other."""


class Peer(nn.Module):
    """The same model as `VisionLanguageModel`, from transformers.

    Shapes: B samples, S image side in pixels, I image tokens, T text tokens, V = lm_vocab_size.
    """

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_encoder = SiglipVisionModel(_vision_config(config))
        self.projector = nn.Linear(
            config.vit_hidden_dim * config.mp_pixel_shuffle_factor**2,
            config.lm_hidden_dim,
            bias=False,
        )
        self.decoder = LlamaForCausalLM(_decoder_config(config))

    def image_tokens(self, images: Tensor) -> Tensor:
        """Return uint8[B, 3, S, S] as float[B, I, lm_hidden_dim]."""
        mean, std = (
            images.new_tensor(values, dtype=torch.float32)[:, None, None]
            for values in (self.config.image_mean, self.config.image_std)
        )
        patches = self.vision_encoder((images / 255 - mean) / std).last_hidden_state
        return self.projector(pixel_shuffle(patches, self.config.mp_pixel_shuffle_factor))

    def embed(self, input_ids: Tensor, images: Tensor) -> Tensor:
        """int[B, T], uint8[B, 3, S, S] -> float[B, I + T, lm_hidden_dim]"""
        text = self.decoder.get_input_embeddings()(input_ids)
        return torch.cat((self.image_tokens(images), text), dim=1)

    def forward(self, input_ids: Tensor, images: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of the text's tokens, float[B, T, V]; all positions are computed.

        Args:
            input_ids: int[B, T]
            images: uint8[B, 3, S, S]
            attention_mask: int[B, T], 0 for padding. Positions count it, as in nanoVLM v0.1.
        """
        num_image_tokens = self.config.num_image_tokens
        logits: Tensor = self.decoder(
            inputs_embeds=self.embed(input_ids, images),
            attention_mask=nn.functional.pad(attention_mask, (num_image_tokens, 0), value=1),
            use_cache=False,
        ).logits
        return logits[:, num_image_tokens:]

    @torch.no_grad()
    def copy_weights(self, model: VisionLanguageModel) -> None:
        """Take over the weights of `model`."""
        theirs = dict(renamed(model.named_parameters()))
        for name, parameter in self.named_parameters():
            parameter.copy_(theirs.pop(plain_name(name)).view_as(parameter))
        assert not theirs, f"the peer has no {sorted(theirs)}"


def plain_name(name: str) -> str:
    """Return the name of a parameter of the peer; some releases put one level more into it."""
    return name.replace("vision_encoder.vision_model.", "vision_encoder.")


def renamed(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors, one for each of our parameters, under the peer's names for these."""
    for name, tensor in tensors:
        part = next(prefix for prefix in RENAMED if name.startswith(prefix))
        for ours, theirs in RENAMED[part]:
            name = name.replace(ours, theirs)
        if "qkv_proj" in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace("qkv", letter), third
        else:
            yield name, tensor


def pixel_shuffle(patches: Tensor, factor: int) -> Tensor:
    """Join each factor x factor block: float[B, N, D] -> float[B, N / factor^2, factor^2 * D]"""
    batch, num_patches, dim = patches.shape
    side = int(num_patches**0.5)
    grid = patches.view(batch, side, side // factor, factor * dim)  # columns joined
    grid = grid.permute(0, 2, 1, 3).reshape(batch, side // factor, side // factor, -1)
    return grid.permute(0, 2, 1, 3).reshape(batch, (side // factor) ** 2, -1)


def _vision_config(config: VLMConfig) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=config.vit_hidden_dim,
        intermediate_size=config.vit_mlp_dim,
        num_hidden_layers=config.vit_n_blocks,
        num_attention_heads=config.vit_n_heads,
        image_size=config.vit_img_size,
        patch_size=config.vit_patch_size,
        layer_norm_eps=config.vit_ln_eps,
        vision_use_head=False,
    )


def _decoder_config(config: VLMConfig) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=config.lm_hidden_dim,
        intermediate_size=config.lm_inter_dim,
        num_hidden_layers=config.lm_n_blocks,
        num_attention_heads=config.lm_n_heads,
        num_key_value_heads=config.lm_n_kv_heads,
        vocab_size=config.lm_vocab_size,
        rms_norm_eps=config.lm_rms_eps,
        max_position_embeddings=config.lm_max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.lm_re_base},
        tie_word_embeddings=config.lm_tie_weights,
        pad_token_id=None,
        bos_token_id=config.lm_eos_token_id,
        eos_token_id=config.lm_eos_token_id,
    )
