"""Answer a question about an image with a saved model."""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from nanovlm import cli
from nanovlm.config.schema import VLMConfig
from nanovlm.data.images import UnreadableImage, read_image, resize_to_uint8
from nanovlm.data.text import encode, training_prompt
from nanovlm.data.tokenizer import model_tokenizer
from nanovlm.errors import ErrorCollector, UserError
from nanovlm.evaluation.answering import find_model
from nanovlm.files import user_path
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import evaluating, find_device, image_input, mixed_precision

EXAMPLES = """examples:
  python -m nanovlm generate --checkpoint results/digits/best --image digit.png \\
      --prompt "Which digit is this? Options: A: 1, B: 3, C: 7, D: 9"
  python -m nanovlm generate --checkpoint lusxvr/nanoVLM-222M --image photo.jpg \\
      --prompt "What is in the image?" --temperature 0.7 --top-p 0.9 --seed 1
"""

LONGEST_ANSWER = 64
"""Tokens, if nothing else is asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="a saved model: folder, hub id or URI")
    parser.add_argument("--image", type=user_path, required=True, help="an image file")
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
        image = read_image_file(arguments.image)
    with problems:
        folder = find_model("--checkpoint", arguments.checkpoint)
    problems.raise_if_any()
    model = VisionLanguageModel.from_pretrained(folder).to(device)
    tokenizer = model_tokenizer(model.config)
    prompt = prompt_tokens(model.config, tokenizer, arguments.prompt)
    max_new_tokens = answer_length(model.config, len(prompt), arguments.max_new_tokens)
    tokens = answer(model, prompt, image, max_new_tokens, arguments)
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


def prompt_tokens(config: VLMConfig, tokenizer: Tokenizer, question: str) -> list[int]:
    """Return the question as the model was trained to read it.

    Raises UserError if the tokenizer has more tokens than the model.
    """
    (tokens,) = encode(tokenizer, [training_prompt(question)])
    if max(tokens) >= config.lm_base_vocab_size:
        raise UserError(
            f"--checkpoint: token {max(tokens)} of lm_tokenizer={config.lm_tokenizer!r} is none of "
            f"the model's lm_vocab_size={config.lm_vocab_size}{config.traits.less_extra_tokens}"
        )
    return tokens


def answer_length(config: VLMConfig, num_prompt_tokens: int, wanted: int | None) -> int:
    """Return the longest answer in tokens: what is wanted, or else what there is room for.

    Raises UserError if image, prompt and answer are longer than the model's positions.
    """
    num_given = config.num_image_tokens + num_prompt_tokens
    room = config.lm_max_position_embeddings - num_given
    if (wanted or 1) > room:
        raise UserError(
            f"--prompt: {config.num_image_tokens} image tokens + {num_prompt_tokens} of the prompt "
            f"+ {wanted or 1} of the answer exceed the model's "
            f"lm_max_position_embeddings={config.lm_max_position_embeddings}"
        )
    return wanted or min(room, LONGEST_ANSWER)


def answer(
    model: VisionLanguageModel,
    prompt: list[int],
    image: Image.Image,
    max_new_tokens: int,
    arguments: argparse.Namespace,
) -> list[int]:
    """Return the tokens of the answer, without the EOS that ends it."""
    config, device = model.config, model.MP.proj.weight.device
    pixels = resize_to_uint8(image, config.vit_img_size, config.image_resampling)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    with evaluating(model), mixed_precision(device):
        output: Tensor = model.generate(
            torch.tensor([prompt], device=device),
            image_input(torch.from_numpy(pixels)[None].to(device), config),
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
