"""Tokenizers by name, and what a model has in common with one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from nanovlm import downloads
from nanovlm.config.generations import V8K
from nanovlm.config.schema import VLMConfig
from nanovlm.data.digits import digits_tokenizer
from nanovlm.data.text import encode
from nanovlm.data.tokenizer import (
    check_tokens,
    load_tokenizer,
    model_chat_template,
    model_tokenizer,
)
from nanovlm.errors import UserError
from nanovlm.tokenizer_files import chat_template, eos_token_id


def test_a_tokenizer_from_a_folder_is_the_builtin_one_saved_there(tmp_path: Path) -> None:
    digits_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).to_str() == load_tokenizer("builtin:digits").to_str()


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vlm.lm_tokenizer=.*has no tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_stored_padding_and_truncation_are_put_off(tmp_path: Path) -> None:
    tokenizer = digits_tokenizer()
    tokenizer.enable_padding(pad_id=0)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["Which digit is this?", "this?"]
    lengths = [len(e.ids) for e in load_tokenizer(str(tmp_path)).encode_batch(texts)]
    assert lengths == [4, 1]


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"vlm.lm_tokenizer=.*tokenizer.json is not a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_an_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: str, **__: object) -> str:
        raise ConnectionError("no route to hub")

    monkeypatch.setattr(downloads, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"'some/model'.*no route to hub.*digits.yaml"):
        load_tokenizer("some/model")


def tokenizer_of(folder: Path, words: dict[str, int], special: list[str]) -> Tokenizer:
    """Save a tokenizer of these words in a folder, and return it."""
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder))


def refusals(
    tokenizer: Tokenizer, lm_vocab_size: int = 600, lm_eos_token_id: int = 0
) -> tuple[str, ...]:
    vlm = VLMConfig(
        lm_tokenizer="mine", lm_vocab_size=lm_vocab_size, lm_eos_token_id=lm_eos_token_id
    )
    with pytest.raises(UserError) as caught:
        check_tokens(vlm, tokenizer)
    return caught.value.messages


def test_ids_count_and_not_the_number_of_tokens(tmp_path: Path) -> None:
    words = {"<end>": 0, **{f"w{i}": 500 + i for i in range(58)}, "<more>": 559}
    tokenizer = tokenizer_of(tmp_path, words, ["<end>", "<more>"])
    assert tokenizer.get_vocab_size() == 60
    check_tokens(VLMConfig(lm_tokenizer="mine", lm_vocab_size=560), tokenizer)
    assert refusals(tokenizer, lm_vocab_size=64) == (
        "vlm.lm_vocab_size must be above all token ids of vlm.lm_tokenizer='mine', "
        "got 64 and ids up to 559",
    )


def test_added_tokens_count(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, {"<end>": 0, "a": 1}, ["<end>", "<image>", "<row>"])
    check_tokens(VLMConfig(lm_tokenizer="mine", lm_vocab_size=4), tokenizer)
    [message] = refusals(tokenizer, lm_vocab_size=3)
    assert "got 3 and ids up to 3" in message


def test_eos_is_a_special_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, {"hello": 0, "world": 1}, ["<end>", "<start>"])
    check_tokens(VLMConfig(lm_tokenizer="mine", lm_eos_token_id=2), tokenizer)
    assert refusals(tokenizer) == (
        "vlm.lm_eos_token_id must be a special token, got 0: 'hello', which is text, in "
        "vlm.lm_tokenizer='mine'. Choices: 2 (<end>), 3 (<start>)",
    )
    assert "got 77: no token in" in refusals(tokenizer, lm_eos_token_id=77)[0]


@pytest.mark.parametrize("written", ['"<end>"', '{"content": "<end>", "lstrip": false}'])
def test_eos_as_the_tokenizer_names_it(tmp_path: Path, written: str) -> None:
    tokenizer_of(tmp_path, {"hello": 0, "world": 1}, ["<start>", "<end>"])
    assert eos_token_id(str(tmp_path)) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(f'{{"eos_token": {written}, "model_max_length": 1e30}}')
    assert eos_token_id(str(tmp_path)) == 3
    assert eos_token_id("builtin:digits") == 0
    config.write_text('{"eos_token": null}')
    assert eos_token_id(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token": "<nowhere>"}', "eos_token='<nowhere>', which is no token of it"),
        ("[", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"eos_token": {}}', "cannot be read"),
    ],
)
def test_a_tokenizer_config_that_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    tokenizer_of(tmp_path, {"hello": 0}, ["<end>"])
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"vlm.lm_tokenizer=.*tokenizer_config.json") as caught:
        eos_token_id(str(tmp_path))
    assert message in str(caught.value)


def v02(folder: Path, lm_vocab_size: int = 600, lm_eos_token_id: int = 0) -> VLMConfig:
    return VLMConfig(
        generation="v0.2",
        lm_tokenizer=str(folder),
        lm_vocab_size=lm_vocab_size,
        lm_eos_token_id=lm_eos_token_id,
        lm_max_length=512,
    )


def image_tokenizer(folder: Path, added: list[str]) -> None:
    """Save a tokenizer of the pieces of `<|image|>` and these tokens."""
    pieces = ["?", "what", "<|", "image", "|>"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')


@pytest.mark.parametrize("added", [["<end>"], ["<end>", "<|image|>"]])
def test_the_image_token_in_a_text_is_text(tmp_path: Path, added: list[str]) -> None:
    """Also if nanoVLM has saved the tokenizer with it. Other special tokens stay what they are."""
    image_tokenizer(tmp_path, added)
    vlm = v02(tmp_path, lm_vocab_size=7, lm_eos_token_id=5)
    tokenizer = model_tokenizer(vlm)
    assert encode(tokenizer, ["what <|image|> <end>"]) == [[1, 2, 3, 4, 5]]
    check_tokens(vlm, tokenizer)


def test_other_generations_keep_it_as_it_is(tmp_path: Path) -> None:
    image_tokenizer(tmp_path, ["<end>", "<|image|>"])
    tokenizer = model_tokenizer(VLMConfig(lm_tokenizer=str(tmp_path)))
    assert encode(tokenizer, ["what <|image|>"]) == [[1, 6]]


def test_an_image_token_before_others_is_an_error(tmp_path: Path) -> None:
    image_tokenizer(tmp_path, ["<|image|>", "<end>"])
    with pytest.raises(UserError, match=r"vlm.lm_tokenizer=.*<\|image\|> must be the last"):
        model_tokenizer(v02(tmp_path))


def test_extra_tokens_take_the_last_ids(tmp_path: Path) -> None:
    image_tokenizer(tmp_path, ["<end>"])
    vlm = v02(tmp_path, lm_vocab_size=6, lm_eos_token_id=0)
    with pytest.raises(UserError, match=r"lm_vocab_size less 1 extra token must be above all .* 5"):
        check_tokens(vlm, model_tokenizer(vlm))


def test_eos_that_no_file_would_hold_is_an_error(tmp_path: Path) -> None:
    image_tokenizer(tmp_path, ["<end>", "<start>"])
    vlm = v02(tmp_path, lm_eos_token_id=6)
    with pytest.raises(UserError, match=r"must be the eos_token of .*, which is 5, in models of"):
        check_tokens(vlm, model_tokenizer(vlm))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"must be the eos_token of .*, which names none, in"):
        check_tokens(vlm, model_tokenizer(vlm))
    check_tokens(dataclasses.replace(vlm, generation="v0.1"), model_tokenizer(vlm))


EXTRA = list(V8K.extra_tokens.values())


def tiled(folder: Path, **changes: Any) -> VLMConfig:
    """Return a model of 8k for the six tokens of `image_tokenizer` with `<end>`."""
    values = {"lm_tokenizer": str(folder), "lm_vocab_size": 6 + 66, "lm_eos_token_id": 5}
    return VLMConfig(generation="8k", max_img_size=448, lm_max_length=512, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("added", [["<end>"], ["<end>", *EXTRA], ["<end>", *EXTRA[:3]]])
def test_extra_tokens_of_8k_are_tokens_with_the_last_ids(tmp_path: Path, added: list[str]) -> None:
    """Whether the tokenizer's files have all of them, some or none."""
    image_tokenizer(tmp_path, added)
    vlm = tiled(tmp_path)
    tokenizer = model_tokenizer(vlm)
    assert [tokenizer.token_to_id(token) for token in EXTRA] == list(range(6, 72))
    assert vlm.image_token_id == 6
    assert EXTRA[1:3] == ["<|global_image|>", "<row_1_col_1>"] and EXTRA[-1] == "<row_8_col_8>"
    text = "what<|image|> <|global_image|><row_8_col_8><end>"
    assert encode(tokenizer, [text]) == [[1, 6, 7, 71, 5]]
    assert all(tokenizer.get_added_tokens_decoder()[n].special for n in range(6, 72))
    check_tokens(vlm, tokenizer)


@pytest.mark.parametrize(
    ("added", "token", "number", "expected"),
    [
        (["<end>", "<more>"], "<|image|>", 7, 6),
        (["<|image|>", "<end>"], "<|image|>", 5, 6),
        (["<end>", EXTRA[0], EXTRA[2], EXTRA[1]], "<|global_image|>", 8, 7),
        ([], "<|image|>", 5, 6),
    ],
)
def test_extra_tokens_of_8k_that_cannot_have_their_ids(
    tmp_path: Path, added: list[str], token: str, number: int, expected: int
) -> None:
    image_tokenizer(tmp_path, added)
    with pytest.raises(UserError) as caught:
        model_tokenizer(tiled(tmp_path))
    assert caught.value.messages == (
        f"vlm.lm_tokenizer='{tmp_path}': {token} must have the id {expected}, but would have "
        f"{number}: the 66 extra tokens of generation 8k follow all others and fill up "
        "vlm.lm_vocab_size=72",
    )


def test_a_tokenizer_of_8k_without_its_extra_tokens_has_no_token_too_many(tmp_path: Path) -> None:
    image_tokenizer(tmp_path, ["<end>", "<more>"])
    with pytest.raises(UserError, match=r"lm_vocab_size less 66 extra tokens must be above .* 6"):
        check_tokens(tiled(tmp_path), load_tokenizer(str(tmp_path)))


def test_the_chat_template_is_that_of_the_model_or_else_of_the_tokenizer(tmp_path: Path) -> None:
    image_tokenizer(tmp_path, ["<end>"])
    config = tmp_path / "tokenizer_config.json"
    with pytest.raises(UserError, match=r"no chat template, .* set vlm.lm_chat_template, for"):
        model_chat_template(tiled(tmp_path))
    assert model_chat_template(tiled(tmp_path, lm_chat_template="mine")) == "mine"
    several = [{"name": "tools", "template": "of tools"}, {"name": "default", "template": "usual"}]
    for stored, expected in (("one", "one"), (several, "usual"), (several[:1], None)):
        config.write_text(json.dumps({"eos_token": "<end>", "chat_template": stored}))
        assert chat_template(str(tmp_path)) == expected
    (tmp_path / "chat_template.jinja").write_text("in its own file")
    assert model_chat_template(tiled(tmp_path)) == "in its own file"


@pytest.mark.parametrize("stored", [1, ["one"], [{"name": "default"}]])
def test_a_chat_template_that_is_none(tmp_path: Path, stored: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    with pytest.raises(UserError, match=r"vlm.lm_tokenizer=.*tokenizer_config.json cannot be read"):
        chat_template(str(tmp_path))
