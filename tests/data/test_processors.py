"""Tokenizers by name, images as pixels."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from nanovlm.data import processors
from nanovlm.data.digits import digits_tokenizer
from nanovlm.data.processors import image_to_uint8, load_tokenizer
from nanovlm.errors import UserError


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
    def unreachable(*_: str, **__: list[str]) -> str:
        raise ConnectionError("no route to hub")

    monkeypatch.setattr(processors, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"'some/model'.*no route to hub.*digits.yaml"):
        load_tokenizer("some/model")


def test_an_image_becomes_pixels_as_in_training() -> None:
    image = Image.new("RGBA", (100, 20), (255, 0, 0, 0))
    pixels = image_to_uint8(image, 10, "bicubic")
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 10, 10)
    assert (pixels == 255).all()
