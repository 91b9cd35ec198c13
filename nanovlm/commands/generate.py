"""Answer a question about an image, or several, with a saved model."""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nanovlm import cli
from nanovlm.config.schema import VLMConfig
from nanovlm.data.images import UnreadableImage, read_image
from nanovlm.data.tokenizer import model_tokenizer
from nanovlm.errors import ErrorCollector, UserError
from nanovlm.evaluation.answering import find_model
from nanovlm.evaluation.questions import PromptTokens, Question, QuestionReader
from nanovlm.files import user_path
from nanovlm.models.checkpoint import read_config
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import evaluating, find_device, image_input, mixed_precision

EXAMPLES = """examples:
  python -m nanovlm generate --checkpoint results/digits/best --image digit.png \\
      --prompt "Which digit is this? Options: A: 1, B: 3, C: 7, D: 9"
  python -m nanovlm generate --checkpoint lusxvr/nanoVLM-222M --image photo.jpg \\
      --prompt "What is in the image?" --temperature 0.7 --top-p 0.9 --seed 1
  python -m nanovlm generate --checkpoint lusxvr/nanoVLM-460M-8k --image before.jpg \\
      --image after.jpg --prompt "What has changed?"
"""

LONGEST_ANSWER = 64
"""Tokens, if nothing else is asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a saved model: folder, hub id or URI")
    parser.add_argument(
        "--image",
        type=user_path,
        action="append",
        default=[],
        help="an image file; models of generation 8k read several, or none",
    )
    parser.add_argument("--prompt", required=True, help="the question, without any wording of ours")
    parser.add_argument(
        "--max-new-tokens",
        type=cli.at_least_one,
        help=f"the longest answer; default: {LONGEST_ANSWER}, or what the model has positions for",
    )
    parser.add_argument(
        "--temperature", type=cli.above_zero, help="draw tokens at random; default: the likeliest"
    )
    parser.add_argument("--top-k", type=cli.at_least_one, help="draw from so many likeliest tokens")
    parser.add_argument(
        "--top-p", type=cli.above_zero, help="draw from the likeliest that reach this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU where there is one")


def run(arguments: argparse.Namespace) -> int:
    problems = ErrorCollector()
    with problems:
        check_sampling_arguments(arguments)
    with problems:
        device = find_device("--device", arguments.device)
    with problems:
        images = [read_image_file(path) for path in arguments.image]
    with problems:
        folder = find_model("--checkpoint", arguments.checkpoint)
    problems.raise_if_any()
    config = read_config(folder, {})
    check_number_of_images(config, len(images))
    tokenizer = model_tokenizer(config)
    reader = QuestionReader(config, tokenizer)
    question = Question(arguments.prompt, lambda: images, "--prompt")
    (prompt,) = reader.read([question])
    check_vocabulary(config, prompt)
    max_new_tokens = answer_length(config, prompt, arguments.max_new_tokens)
    model = VisionLanguageModel.from_pretrained(folder).to(device)
    tokens = answer(model, prompt, reader.pixels([(question, prompt)]), max_new_tokens, arguments)
    sys.stdout.write(f"{tokenizer.decode(tokens).strip()}\n")
    return cli.DONE


def check_sampling_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError if something is given that would have no effect, or cannot be."""
    messages = [
        f"--{name}: nothing is drawn at random without --temperature"
        for name, value in (("top-k", arguments.top_k), ("top-p", arguments.top_p))
        if value is not None and arguments.temperature is None
    ]
    if arguments.top_p is not None and arguments.top_p > 1:
        messages.append(f"--top-p: must be at most 1, got {arguments.top_p}")
    if not 0 <= arguments.seed < 2**63:
        messages.append(f"--seed: must be at least 0 and below 2^63, got {arguments.seed}")
    if messages:
        raise UserError(*messages)


def read_image_file(path: Path) -> Image.Image:
    """Return the image of a file, decoded as in training. Raises UserError if there is none."""
    try:
        return read_image({"bytes": path.read_bytes(), "path": None})
    except (OSError, UnreadableImage) as error:
        raise UserError(f"--image: {path} cannot be read as an image: {error}") from error


def check_number_of_images(config: VLMConfig, number: int) -> None:
    """Raise UserError if the model does not read so many images."""
    if number != 1 and not config.traits.is_tiled:
        raise UserError(
            f"--image: a model of generation {config.generation} reads exactly one image, got "
            f"{number}"
        )


def check_vocabulary(config: VLMConfig, prompt: PromptTokens) -> None:
    """Raise UserError if the tokenizer has more tokens than the model; in 8k they are checked."""
    largest = max(prompt.text)
    if largest >= config.lm_base_vocab_size and not config.traits.is_tiled:
        raise UserError(
            f"--checkpoint: token {largest} of lm_tokenizer={config.lm_tokenizer!r} is none of "
            f"the model's lm_vocab_size={config.lm_vocab_size}{config.traits.less_extra_tokens}"
        )


def answer_length(config: VLMConfig, prompt: PromptTokens, wanted: int | None) -> int:
    """Return the longest answer in tokens: what is wanted, or else what there is room for.

    Raises UserError if images, prompt and answer are longer than the model's positions.
    """
    room = config.lm_max_position_embeddings - prompt.length(config)
    if (wanted or 1) > room:
        raise UserError(
            f"--prompt: {len(prompt.places) * config.num_image_tokens} image tokens + "
            f"{len(prompt.text)} of the prompt + {wanted or 1} of the answer exceed the model's "
            f"lm_max_position_embeddings={config.lm_max_position_embeddings}"
        )
    return wanted or min(room, LONGEST_ANSWER)


def answer(
    model: VisionLanguageModel,
    prompt: PromptTokens,
    images: Tensor,
    max_new_tokens: int,
    arguments: argparse.Namespace,
) -> list[int]:
    """Return the tokens of the answer, without the EOS that ends it.

    Args:
        images: uint8[K, 3, S, S], all images or their tiles.
    """
    config, device = model.config, model.MP.proj.weight.device
    generator = torch.Generator(device).manual_seed(arguments.seed)
    with evaluating(model), mixed_precision(device):
        output: Tensor = model.generate(
            torch.tensor([prompt.with_placeholders(config)], device=device),
            image_input(images.to(device), config),
            max_new_tokens=max_new_tokens,
            greedy=arguments.temperature is None,
            temperature=arguments.temperature or 1.0,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            generator=generator,
        )
    tokens: list[int] = output[0].tolist()
    eos = config.lm_eos_token_id
    return tokens[: tokens.index(eos)] if eos in tokens else tokens
