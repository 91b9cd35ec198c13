"""Conversations as tokens, against transformers' own and nanoVLM's rule of what is learnt."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from nanovlm.config.generations import V8K
from nanovlm.config.schema import VLMConfig
from nanovlm.config.sources import build_config, preset_layer
from nanovlm.data.chat import ChatEncoder, EncodedChat, Message
from nanovlm.data.tiles import Tiling, image_text
from nanovlm.data.tokenizer import model_tokenizer
from nanovlm.errors import UserError
from tests.hub_data import write_tokenizer

TOKENS = V8K.extra_tokens
EXTRA = list(TOKENS.values())
IMAGE = TOKENS["image_token"]
TEXTS = ["What is shown here?", "A red circle, and é 12 blue bars.", "Yes.", "user assistant \n"]
CHATML = build_config(preset_layer("nanovlm-460m-8k")).vlm.lm_chat_template
SYSTEM = "<|im_start|>system\nBe kind, é.<|im_end|>\n"
WITH_SYSTEM = f"{SYSTEM}{CHATML}"
VOCABULARY = 300

ONE, TWO = [("What is shown here?", "A red circle.")], [("What?", " Yes.\nYes"), ("é 12?", "Yes")]
FIVE = [(f"What is {i}?" * i, "Yes. " * i + f"{i}") for i in range(1, 6)]
GRID, SINGLE = Tiling(3, 2), Tiling(1, 1)
CASES: dict[str, tuple[str | None, list[Tiling], list[tuple[str, str]]]] = {
    "one image": (CHATML, [SINGLE], ONE),
    "text before the image": (WITH_SYSTEM, [SINGLE], TWO),
    "two images": (CHATML, [GRID, SINGLE], TWO),
    "no image": (CHATML, [], TWO),
    "3 x 2 tiles": (CHATML, [GRID], ONE),
    "5 turns": (CHATML, [GRID, SINGLE, Tiling(1, 2)], FIVE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a byte-level tokenizer, of SmolLM2's kind."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), TEXTS, VOCABULARY)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """Return transformers' tokenizer of the same files, with the extra tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in EXTRA])
    return tokenizer


def encoder(folder: Path, template: str | None) -> ChatEncoder:
    size = len(AutoTokenizer.from_pretrained(folder))
    vlm = VLMConfig(
        generation="8k",
        max_img_size=448,
        lm_max_length=512,
        lm_tokenizer=str(folder),
        lm_vocab_size=size + len(EXTRA),
        lm_chat_template=template,
    )
    return ChatEncoder.of(vlm, model_tokenizer(vlm))


def conversation(turns: Sequence[tuple[str, str]], images: str = "") -> list[Message]:
    messages: list[Message] = []
    for user, assistant in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    messages[0]["content"] = images + messages[0]["content"]
    return messages


def published_mask(reference: Any, messages: list[Message], num_before: int) -> list[bool]:
    """Return which tokens nanoVLM learns: of each message of an assistant, which it encodes apart,
    those after the prefix of an assistant's message.

    Args:
        num_before: tokens of what the template puts before the first message.
    """
    one = reference.apply_chat_template([{"role": "assistant", "content": "xyzvd"}], tokenize=False)
    prefix = len(reference.encode(one[: one.index("xyzvd")], add_special_tokens=False)) - num_before
    mask = [False] * num_before
    for message in messages:
        text = reference.apply_chat_template([message], tokenize=False)
        num_tokens = len(reference.encode(text, add_special_tokens=False)) - num_before
        is_answer = message["role"] == "assistant"
        mask += [is_answer and place >= prefix for place in range(num_tokens)]
    return mask


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_what_is_learnt_are_transformers_and_nanovlms(
    folder: Path, reference: Any, case: str
) -> None:
    template, tilings, turns = CASES[case]
    chat = encoder(folder, template)
    [found] = chat.encode([conversation(turns, image_text(tilings, TOKENS))])
    reference.chat_template = template
    messages = conversation(turns, image_text(tilings, TOKENS, 64))
    whole = reference.apply_chat_template(messages, tokenize=True, return_dict=False)
    num_before = 0
    if template == WITH_SYSTEM:
        num_before = len(reference.encode(SYSTEM, add_special_tokens=False))
    mask = published_mask(reference, messages, num_before)
    assert len(mask) == len(whole)
    image_token = reference.convert_tokens_to_ids(IMAGE)
    num_tiles = sum(tiling.num_tiles for tiling in tilings)
    assert whole.count(image_token) == 64 * num_tiles
    # As the model reads it: each tile's 64 tokens at its place.
    tokens, is_learnt = list[int](), list[bool]()
    for place in range(len(found.tokens) + 1):
        number = 64 * found.tile_places.count(place)
        tokens += [image_token] * number + found.tokens[place : place + 1]
        is_learnt += [False] * number + found.is_learnt[place : place + 1]
    assert tokens == whole
    assert is_learnt == mask
    assert any(mask) and not all(mask)
    learnt = [token for token, wanted in zip(whole, mask, strict=True) if wanted]
    assert reference.decode(learnt) == "".join(f"{answer}<|im_end|>\n" for _, answer in turns)


def test_many_conversations_at_once_are_each_as_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovlm.data.chat._BATCH_CONVERSATIONS", 2)
    chat = encoder(folder, CHATML)
    some = [conversation(turns, image_text([GRID], TOKENS)) for turns in (ONE, TWO, FIVE)]
    assert chat.encode(some) == [chat.encode([one])[0] for one in some]
    assert chat.encode([]) == []


def test_a_prompt_is_the_beginning_of_the_conversation(folder: Path, reference: Any) -> None:
    chat, images = encoder(folder, CHATML), image_text([GRID], TOKENS)
    whole = conversation(TWO, images)
    [trained] = chat.encode([whole])
    [first] = chat.encode([whole[:2]])
    prompts = chat.encode([whole[:1], whole[:3]], are_prompts=True)
    for prompt, first_learnt in zip(
        prompts,
        [trained.is_learnt.index(True), trained.is_learnt.index(True, len(first.tokens))],
        strict=True,
    ):
        assert prompt.tokens == trained.tokens[:first_learnt]
        assert prompt.tile_places == trained.tile_places and not any(prompt.is_learnt)
    assert reference.decode(prompts[1].tokens).endswith("é 12?<|im_end|>\n<|im_start|>assistant\n")


def test_the_tokenizers_own_template_and_what_it_names(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}" + str(CHATML)
    tokenizer.save_pretrained(tmp_path)
    [found] = encoder(tmp_path, None).encode([conversation(ONE)])
    assert found.tokens[0] == tokenizer.bos_token_id
    [expected] = encoder(folder, CHATML).encode([conversation(ONE)])
    assert found == EncodedChat(
        [tokenizer.bos_token_id, *expected.tokens], [False, *expected.is_learnt], []
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template, which models of generation 8k need"),
        ("{% for %}", "lm_chat_template: cannot make a text of the messages of user, assistant: "),
        ("{{ raise_exception('only system') }}", "messages of user, assistant: only system"),
        ("{{ messages[9]['content'] }}", "messages of user, assistant: .*no element 9"),
        (f"{CHATML}{{{{ messages | length }}}}", r"must give a conversation as its messages one"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<think>{% endif %}",
            r"here\?<think>' of the first messages alone and \.\.\.'.*A red circle.* of more",
        ),
        (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}"
            "{% endfor %}",
            r"gives 0 of a conversation's 7 <\|image\|>",
        ),
    ],
)
def test_templates_that_cannot_be_used(folder: Path, template: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder(folder, template).encode([conversation(ONE, image_text([GRID], TOKENS))])


def test_transformers_is_imported_to_render_alone() -> None:
    code = (
        "import sys, nanovlm.data.prepared, nanovlm.data.chat; "
        "assert 'transformers' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
