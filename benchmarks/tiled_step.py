"""Training on tiles and conversations against a padded loop over transformers' modules.

    python benchmarks/tiled_step.py                             # tiny, CPU; two minutes
    python benchmarks/tiled_step.py --config 460m               # on a GPU; random weights
    python benchmarks/tiled_step.py --json figures.json         # and keep the figures

Both sides train the same model of the 8k generation with the same weights on the same samples,
in turns, in one process. What differs is the padding.

The samples are made up: conversations of one to three turns with the lengths of `setups.py`, about
an image of 1 to 13 tiles, about two, or about none; 23 to 1,000 tokens, tiles included. Learnt are
the answers.

(a) The peer is `peer.py` with the tiles' embeddings in the place of their placeholders. A batch has
a line for each sample, padded to the longest one, or with `--pad-to-limit` to `lm_max_length` as
nanoVLM v0.2 does; logits are computed at all positions. Its batches are made before the clock
starts. Neither side pads what the vision encoder reads, which is most of our work.

(b) This project runs `nanovlm.training.loop.train` as a trial does, batches included.

Useful are the tokens of the samples, tiles included. The losses of the first step are held against
each other: they are the mean over the same labels.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs without being installed

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command_line import device_parser_of
from benchmarks.figures import Figures
from benchmarks.padded import NO_LABEL, peer_optimizer
from benchmarks.peer import Peer
from benchmarks.setups import TEXT_LENGTHS, VLM_CONFIGS, offsets_of, random_images, random_tokens
from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.data.samples import ImageSlots, PreparedSamples, samples_in_order
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.loop import train

TINY = replace(
    VLM_CONFIGS["tiny"],
    generation="8k",
    vit_img_size=64,
    vit_patch_size=8,  # 64 patches a tile, which become 4 tokens: a sixteenth, as published
    mp_pixel_shuffle_factor=4,
    max_img_size=256,
    lm_max_length=1024,
)
PRESETS = {"230m": "nanovlm-230m-8k", "460m": "nanovlm-460m-8k"}
NUM_TILES = ((1,), (1,), (5,), (5,), (7,), (13,), (5, 5), ())
"""Of the images of a sample, each for an eighth of the samples; of more than one the first is the
global one."""
TOLERANCES = {"cpu": 1e-4, "cuda": 5e-3}
"""Largest relative difference between the losses of the first step, in float32 and in bfloat16."""


class Conversation(NamedTuple):
    """One sample; its images stand in front of the text."""

    tokens: Tensor
    """int64[length], of the text."""
    is_learnt: Tensor
    """bool[length]"""
    tiles: list[int]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}")
    figures = Figures(arguments.json, device=where, torch=torch.__version__)
    measure(arguments, device, figures)


def parse_arguments() -> argparse.Namespace:
    parser = device_parser_of(__doc__)
    parser.add_argument("--config", choices=["tiny", *PRESETS], default="tiny")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--compile", action="store_true", help="our side")
    parser.add_argument("--pad-to-limit", action="store_true", help="the peer's lines")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, device: torch.device, figures: Figures) -> None:
    """Time both sides in turns, after one round each that does not count."""
    sides = Sides(arguments, device)
    ratios, speeds = [], []
    for number in range(arguments.rounds + 1):
        these = range(number * arguments.steps, (number + 1) * arguments.steps)
        started = time.perf_counter()
        ours = [sides.step() for _ in these]
        our_seconds = time.perf_counter() - started
        started = time.perf_counter()
        theirs = [sides.peer_step(step) for step in these]
        peer_seconds = time.perf_counter() - started
        if number == 0:
            difference = abs(ours[0] / theirs[0] - 1)
            print(f"loss of the first step: {ours[0]:.6f}, peer {theirs[0]:.6f}")
            assert difference < TOLERANCES[device.type], f"they differ by {difference:.1e}"
            continue
        tokens = sum(sides.useful[step] for step in these)
        ratios.append(peer_seconds / our_seconds)
        speeds.append(tokens / our_seconds)
        print(
            f"round {number}: {speeds[-1]:,.0f} useful tokens/s, "
            f"peer {tokens / peer_seconds:,.0f}: {ratios[-1]:.2f} times",
            flush=True,
        )
    median = statistics.median(ratios)
    print(f"median {median:.2f} times; {sides.useful_share:.0%} of the peer's tokens are useful")
    figures.add(
        useful_tokens_per_second=statistics.median(speeds),
        ratio=median,
        ratios=ratios,
        useful_share_of_peer=sides.useful_share,
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"peak memory of both together: {peak:.1f} GB")
        figures.add(peak_memory_gb=peak)


class Sides:
    """Both sides with the same weights, and the same samples for each step."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        vlm = TINY
        if arguments.config in PRESETS:
            vlm = build_config(preset_layer(PRESETS[arguments.config])).vlm
        config = TrainConfig(
            batch_size=arguments.batch_size, epochs=10**6, compile=arguments.compile,
            warmup_ratio=0.0, lr_schedule="constant", max_grad_norm=None, vlm=vlm,
        )  # fmt: skip
        with device:
            model = VisionLanguageModel(vlm, config.seed, config.compile)
            self._peer = Peer(vlm)
        self._peer.copy_weights(model)
        self._optimizer = peer_optimizer(self._peer, config)
        self._device = device
        num_steps = (arguments.rounds + 1) * arguments.steps
        samples, conversations = make_samples(vlm, config.batch_size * num_steps)
        ends = [(step + 1) * config.batch_size for step in range(num_steps)]
        self._training = train(model, samples, config, ends, device=device)
        length = vlm.lm_max_length if arguments.pad_to_limit else None
        steps = [
            samples_in_order(len(samples), config.seed, end - config.batch_size, end).tolist()
            for end in ends
        ]
        batches = [[conversations[i] for i in step] for step in steps]
        self._padded = [padded_lines(vlm, batch, samples.images, length) for batch in batches]
        self.useful = [sum(num_tokens(vlm, one) for one in batch) for batch in batches]
        """Tokens of the samples of each step."""

    @property
    def useful_share(self) -> float:
        """Of the tokens that the peer computes."""
        return sum(self.useful) / sum(lines.ids.numel() for lines in self._padded)

    def step(self) -> float:
        """Take our next step; return the smoothed loss."""
        return next(self._training).train_loss

    def peer_step(self, step: int) -> float:
        """Take the peer's step of that number; return the loss before it."""
        return peer_step(self._peer, self._optimizer, self._padded[step].to(self._device))


def num_tokens(vlm: VLMConfig, one: Conversation) -> int:
    return len(one.tokens) + vlm.num_image_tokens * len(one.tiles)


def make_samples(vlm: VLMConfig, number: int) -> tuple[PreparedSamples, list[Conversation]]:
    """Return samples in both forms."""
    generator = torch.Generator().manual_seed(0)
    images = random_images(vlm, 64, generator)
    conversations = [_conversation(vlm, i, len(images), generator) for i in range(number)]
    tiles = [one.tiles for one in conversations]
    flat = torch.tensor([tile for own in tiles for tile in own])
    slots = ImageSlots(flat, offsets_of([torch.tensor(own) for own in tiles]), 0 * flat)
    prepared = PreparedSamples(
        images=images,
        slots=slots,
        tokens=torch.cat([one.tokens for one in conversations]).int(),
        offsets=offsets_of([one.tokens for one in conversations]),
        prompt_lengths=torch.tensor([int(one.is_learnt.int().argmax()) for one in conversations]),
        is_learnt=torch.cat([one.is_learnt for one in conversations]),
    )
    return prepared, conversations


def _conversation(
    vlm: VLMConfig, number: int, num_images: int, generator: torch.Generator
) -> Conversation:
    """Return a conversation of turns that follow each other in the table of lengths, as long as
    they fit."""
    num_tiles = sum(NUM_TILES[number % len(NUM_TILES)])
    tiles = [(number + tile) % num_images for tile in range(num_tiles)]
    room = vlm.lm_max_length - vlm.num_image_tokens * num_tiles
    lengths = []
    for turn in range(1 + number // len(NUM_TILES) % 3):
        prompt, answer = TEXT_LENGTHS[(7 * number + turn) % len(TEXT_LENGTHS)]
        if prompt + answer <= room:
            lengths.append((prompt, answer))
            room -= prompt + answer
    lengths = lengths or [TEXT_LENGTHS[0]]
    is_learnt = [torch.arange(p + a) >= p for p, a in lengths]
    total = sum(p + a for p, a in lengths)
    tokens = random_tokens(total, vlm, generator) % vlm.lm_base_vocab_size
    return Conversation(tokens, torch.cat(is_learnt), tiles)


class Lines(NamedTuple):
    """B conversations with placeholders, in lines of T tokens."""

    ids: Tensor
    """int64[B, T]"""
    targets: Tensor
    """int64[B, T]"""
    images: Tensor
    """uint8[K, 3, S, S]"""

    def to(self, device: torch.device) -> "Lines":
        return Lines(*(tensor.to(device) for tensor in self))


def padded_lines(
    vlm: VLMConfig, batch: Sequence[Conversation], images: Tensor, length: int | None
) -> Lines:
    """Return the lines, padded on the right, to the longest one if no length is given."""
    length = length or max(num_tokens(vlm, one) for one in batch)
    ids, targets = [], []
    for one in batch:
        num_placeholders = vlm.num_image_tokens * len(one.tiles)
        line = F.pad(one.tokens, (num_placeholders, 0), value=vlm.image_token_id)
        learnt = F.pad(one.is_learnt, (num_placeholders, 0))
        target = torch.where(learnt, line, NO_LABEL)[1:]
        ids.append(F.pad(line, (0, length - len(line))))
        targets.append(F.pad(target, (0, length - len(target)), value=NO_LABEL))
    tiles = [tile for one in batch for tile in one.tiles]
    return Lines(torch.stack(ids), torch.stack(targets), images[tiles])


def peer_step(peer: Peer, optimizer: torch.optim.Optimizer, lines: Lines) -> float:
    """Take one optimizer step; return the loss before it."""
    optimizer.zero_grad()
    device = lines.ids.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        embeddings = peer.decoder.get_input_embeddings()(lines.ids)
        tiles = peer.image_tokens(lines.images).flatten(0, 1)
        is_tile = (lines.ids == peer.config.image_token_id)[..., None]
        embeddings = embeddings.masked_scatter(is_tile, tiles.to(embeddings.dtype))
        # Padding stands on the right, where no real token looks: no mask is needed.
        logits = peer.decoder(inputs_embeds=embeddings, use_cache=False).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), lines.targets.flatten(), ignore_index=NO_LABEL
        )
    loss.backward()
    optimizer.step()
    return loss.item()


if __name__ == "__main__":
    main()
