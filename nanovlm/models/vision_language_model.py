"""The whole model: images -> vision encoder -> projector -> decoder, with the text.

Training and evaluation pack their samples into one row (`models/packing.py`); `forward` and
`generate` take padded texts and pack them.

Shapes: B samples, K images of S x S pixels and I tokens each, T tokens of the longest text, M text
        tokens of a row, D = lm_hidden_dim, V = lm_vocab_size, A = max_new_tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from nanovlm.config.schema import VLMConfig
from nanovlm.downloads import find_folder
from nanovlm.files import user_path
from nanovlm.models.checkpoint import MODEL_FILES, read_config, read_weights, write_model
from nanovlm.models.compiled import run_block_compiled
from nanovlm.models.language_model import KVCache, LanguageModel
from nanovlm.models.modality_projector import ModalityProjector
from nanovlm.models.packing import ImagePlaces, Packing, find_images, pack
from nanovlm.models.vision_transformer import ViT

IGNORED_TARGET = -100
"""The target of a token that carries no label."""

PARTS = ("vision_encoder", "MP", "decoder")
"""The parts of the model. Their order and number are part of what a seed means."""

_WRITES_TO_RESIDUAL = ("attn.out_proj.weight", "mlp.fc2.weight", "mlp.down_proj.weight")


def likeliest(logits: Tensor) -> Tensor:
    """Take the likeliest token of each sequence: float[B, V] -> int[B]."""
    return logits.argmax(dim=-1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Draw one token a sequence: float[B, V] -> int[B].

    Args:
        temperature: divides the logits; below 1 sharpens the choice.
        top_k: only the k likeliest tokens can be drawn.
        top_p: of those, only the fewest likeliest that together reach this probability.
        generator: the random numbers, on the device of the logits; None takes the global ones.
    """
    num_kept = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    kept, tokens = logits.topk(num_kept)  # (B, num_kept), likeliest first
    probabilities = torch.softmax(kept.float() / temperature, dim=-1)
    if top_p is not None:
        reached_before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(reached_before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(1, drawn).squeeze(1)


@dataclass(frozen=True, eq=False, slots=True)
class Prefill:
    """Prompts that the decoder has read, and its next logits; one `complete` consumes it."""

    logits: Tensor
    """float[B, V], of the token that follows each prompt."""
    cache: KVCache


class VisionLanguageModel(nn.Module):
    """nanoVLM: one image and then text, or where images are cut into tiles, tiles amid the text.

    An image has values from 0 to 1, less `config.image_mean`, divided by `config.image_std`.
    A new model has the initial weights of `seed`; under `torch.device("meta")` it has shapes only.
    Weights stay float32; for speed use autocast, which leaves norms and rotary angles in float32.
    """

    def __init__(self, config: VLMConfig, seed: int = 0, compiled: bool = False) -> None:
        """Make the model.

        Args:
            compiled: training runs compiled code.
        """
        super().__init__()
        self.config = config
        self.compiled = compiled
        device = torch.get_default_device()
        # On meta the layers do not draw initial weights of their own from the global generator.
        with torch.device("meta"):
            self.vision_encoder = ViT(config)
            self.MP = ModalityProjector(config)
            self.decoder = LanguageModel(config)
        if compiled:
            self.vision_encoder.run_block = self.decoder.run_block = run_block_compiled
        if device.type != "meta":
            self.to_empty(device=device)
            self.decoder.tie_weights()
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int, parts: Sequence[str] = PARTS) -> None:
        """Set the initial weights of `seed`, in place; no global random number is drawn.

        Norms are 1 and biases 0. All else is normal with variance 1 / fan-in, so that every width
        starts at the same scale; matrices that write to a residual stream are smaller by
        sqrt(2 x its blocks). Equal to the bit on devices of one kind.

        Args:
            parts: which of PARTS; the others stay as they are. Each draws from a generator of its
                own, so its weights are the same whichever other parts are set.
        """
        device = self.MP.proj.weight.device
        for part in parts:
            generator = Generator(device).manual_seed(_part_seed(seed, part))
            for name, parameter in self.get_submodule(part).named_parameters(prefix=part):
                if name.endswith(".bias"):
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    std = _initial_std(name, parameter, self.config)
                    parameter.normal_(std=std, generator=generator)
        if "decoder" in parts:
            self.decoder.rotary_embd.reset()

    def embed(self, token_ids: Tensor, image: Tensor) -> Tensor:
        """Return the row of all image tokens and then all text tokens.

        int[M], float[K, 3, S, S] -> float[K * I + M, D]

        Args:
            image: or float[K, N, vit_hidden_dim], the vision encoder's output for images.
        """
        text = self.decoder.token_embedding(token_ids)
        if not len(image):
            return text
        patches = image if image.ndim == 3 else self.vision_encoder(image)
        return torch.cat((self.MP(patches).flatten(0, 1), text))

    def hidden_states(self, token_ids: Tensor, image: Tensor, packing: Packing) -> Tensor:
        """Return the decoder's output at the text's tokens, ready for `decoder.head`.

        int[M], float[K, 3, S, S] -> float[M, D]
        """
        return self.decoder(self.embed(token_ids, image), packing)[-len(token_ids) :]

    def forward(
        self,
        input_ids: Tensor,
        image: Tensor,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits float[B, T, V], and the loss if there are targets.

        Args:
            input_ids: int[B, T], the text alone: without the placeholders of v0.2's image tokens.
                Where images are tiled, with I placeholders (`image_token_id`) for each tile
            image: float[K, 3, S, S], normalised by image_mean and image_std; in the order of the
                samples, one for each, or as many tiles as have placeholders
            attention_mask: bool or int [B, T], true for real tokens, wherever they stand; padding
                and placeholders get logits of 0. None if all are real.
            targets: int[B, T], the token that follows each input token; -100 for no label. The
                loss is the mean over the labels, 0 without any.

        Raises:
            ValueError: an input token is one of v0.2's extra tokens, or the images do not fit the
                placeholders.
        """
        is_real = _is_real(input_ids, attention_mask)
        token_ids, packing = self._pack(input_ids, is_real, image)
        hidden = self.hidden_states(token_ids, image, packing)[:-1]  # without the padding
        text_logits = self.decoder.head(hidden)
        logits = text_logits.new_zeros((*is_real.shape, text_logits.shape[-1]))
        is_text = self._is_text(input_ids, is_real)
        logits = logits.masked_scatter(is_text[..., None], text_logits)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORED_TARGET,
            reduction="sum",
        )
        return logits, loss / (targets != IGNORED_TARGET).sum().clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        image: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 5,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        greedy: bool = True,
        generator: Generator | None = None,
    ) -> Tensor:
        """Return the tokens that follow each prompt, int[B, <= A].

        A sequence that has ended with EOS is filled up with EOS; when all have, generation ends.
        Call it in evaluation mode, or dropout takes part.

        Args:
            temperature, top_k, top_p, generator: for sampling, that is without `greedy`.

        Raises:
            ValueError: a number is out of its range, or as `forward`.
        """
        _check_sampling(temperature, top_k, top_p)
        token_ids, packing = self._pack(input_ids, _is_real(input_ids, attention_mask), image)
        prefill = self.prefill(token_ids, image, packing, max_new_tokens)

        def choose(logits: Tensor) -> Tensor:
            return sample(logits, temperature, top_k, top_p, generator)

        return self.complete(prefill, max_new_tokens, likeliest if greedy else choose)

    @torch.no_grad()
    def prefill(
        self, token_ids: Tensor, image: Tensor, packing: Packing, max_new_tokens: int = 5
    ) -> Prefill:
        """Read the prompts, with room in the cache for `max_new_tokens`.

        Args:
            token_ids: int[M]
            image: float[K, 3, S, S]
            packing: of the prompts.

        Raises:
            ValueError: there is no room for a token.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        cache = KVCache(packing.positions[packing.last] + 1, room=max_new_tokens - 1)
        hidden = self.decoder(self.embed(token_ids, image), packing, cache)
        return Prefill(self._next_logits(hidden[packing.last]), cache)

    @torch.no_grad()
    def complete(
        self,
        prefill: Prefill,
        max_new_tokens: int,
        choose: Callable[[Tensor], Tensor] = likeliest,
    ) -> Tensor:
        """Return the tokens that follow each prompt, as `generate` does.

        Args:
            max_new_tokens: at most what the prefill has room for.
            choose: takes logits float[B, V] to tokens int[B].
        """
        eos = self.config.lm_eos_token_id
        logits = prefill.logits
        tokens = torch.empty((len(logits), 0), dtype=torch.int64, device=logits.device)
        ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        while True:
            token = choose(logits).masked_fill(ended, eos)  # (B,)
            tokens = torch.cat((tokens, token[:, None]), dim=1)
            ended = (tokens == eos).any(dim=1)
            if tokens.shape[1] == max_new_tokens or ended.all():  # waits for the device
                return tokens
            hidden = self.decoder.step(self.decoder.token_embedding(token), prefill.cache)
            logits = self._next_logits(hidden)

    def _next_logits(self, last: Tensor) -> Tensor:
        """float[B, D] -> float[B, V]"""
        # In bfloat16 the likeliest tokens would often tie, and the lower id would win.
        with torch.autocast(last.device.type, enabled=False):
            return self.decoder.head(last)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into the folder, made if it is not there."""
        write_model(user_path(folder), self.config, self)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, **overrides: Any
    ) -> Self:
        """Load what `save_pretrained` has written, or a published nanoVLM model, on the CPU.

        Args:
            name: a folder, or a repository of the hub such as `lusxvr/nanoVLM-222M`, of one of the
                generations in `config/generations.py`.
            revision: a branch, tag or commit of the repository.
            overrides: VLMConfig keys that win over the file's, such as `lm_dropout=0.1`.

        Raises:
            UserError: a file is missing or broken, or does not come from the hub; an unknown key;
                missing, unknown or mis-shaped tensors, all listed.
        """
        folder = find_folder("model", str(name), MODEL_FILES, revision)
        with torch.device("meta"):
            model = cls(read_config(folder, overrides))
        model.to_empty(device="cpu")
        model.decoder.tie_weights()
        model.load_weights(folder)
        return model

    def load_weights(self, folder: Path) -> None:
        """Copy the weights of a saved model of the same architecture into this one, in place.

        Raises:
            UserError: the file is missing or broken, or its tensors do not fit, all listed.
        """
        read_weights(folder, self, self.config.lm_tie_weights)

    def _pack(self, input_ids: Tensor, is_real: Tensor, image: Tensor) -> tuple[Tensor, Packing]:
        """Return padded texts as a row: int[B, T], bool[B, T] -> int[M], their packing

        Raises:
            ValueError: the placeholders do not fit the images.
        """
        real_ids = input_ids[is_real]
        lengths = is_real.sum(dim=1).cpu()  # waits for the device
        if self.config.traits.is_tiled:
            is_text = (real_ids != self.config.image_token_id).cpu()
            lengths, images = find_images(is_text, lengths, self.config.num_image_tokens)
            real_ids = real_ids[is_text.to(real_ids.device)]
        else:
            images = ImagePlaces.one_in_front(len(lengths))
            base_size = self.config.lm_base_vocab_size
            if self.config.extra_token_amount and (real_ids >= base_size).any():
                raise ValueError(
                    f"input_ids must be below {base_size}, the tokens of text: the image is put "
                    "before the text, in which no placeholder stands for it"
                )
        if len(images.places) != len(image):
            raise ValueError(
                f"input_ids have places for {len(images.places)} images, not {len(image)}"
            )
        token_ids = F.pad(real_ids, (0, 1))  # one token of padding
        num_image_tokens = self.config.num_image_tokens
        packing = pack(lengths, num_image_tokens, len(token_ids), images=images)
        return token_ids, packing.to(token_ids.device)

    def _is_text(self, input_ids: Tensor, is_real: Tensor) -> Tensor:
        """Return bool[B, T], false for padding and for placeholders of images."""
        if not self.config.traits.is_tiled:
            return is_real
        return is_real & (input_ids != self.config.image_token_id)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError if a setting is out of its range."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, or None, got {top_p}")


def _is_real(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return bool[B, T], false for padding."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return attention_mask.bool()


def _part_seed(seed: int, part: str) -> int:
    return int(np.random.SeedSequence([seed, PARTS.index(part)]).generate_state(1)[0])


def _initial_std(name: str, parameter: Tensor, config: VLMConfig) -> float:
    if name.endswith("position_embedding"):
        return config.vit_hidden_dim**-0.5
    std = parameter[0].numel() ** -0.5
    if name.endswith(_WRITES_TO_RESIDUAL):
        in_decoder = name.startswith("decoder.")
        std /= (2 * (config.lm_n_blocks if in_decoder else config.vit_n_blocks)) ** 0.5
    return std
