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


def test_an_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: str, **__: list[str]) -> str:
        raise ConnectionError("no route to hub")

    monkeypatch.setattr(processors, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"'some/model'.*no route to hub.*digits.yaml"):
        load_tokenizer("some/model")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    pixels = image_to_uint8(Image.new("RGB", (7, 5), "white").convert(mode), 4)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 4, 4)
    assert (pixels == 255).all()


def test_the_whole_image_is_squashed() -> None:
    image = Image.new("RGB", (100, 20), (255, 0, 0))
    image.paste((0, 0, 255), (50, 0, 100, 20))
    red, green, blue = image_to_uint8(image, 10)
    assert (red[:, :4] == 255).all() and (red[:, 6:] == 0).all()
    assert (blue[:, :4] == 0).all() and (blue[:, 6:] == 255).all()
    assert (green == 0).all()
