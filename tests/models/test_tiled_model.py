"""Models that read tiles amid the text: against transformers' parts joined by placeholders."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanovlm.models.packing import ImagePlaces, pack
from nanovlm.models.vision_language_model import IGNORED_TARGET, VisionLanguageModel
from tests.models.v02_files import (
    CHANGES_8K,
    IMAGE_TOKEN,
    Parts,
    make_parts,
    placeholder_logits,
    write_checkpoint,
)

GLOBAL, FIRST_TILE = IMAGE_TOKEN + 1, IMAGE_TOKEN + 2
TILE = [IMAGE_TOKEN] * 4
SIX_TILES = [
    GLOBAL,
    *TILE,
    *(
        token
        for row in range(3)
        for column in range(2)
        for token in (FIRST_TILE + 8 * row + column, *TILE)
    ),
]
TURNS = [token for turn in range(5) for token in (1, 20 + turn, 2, 1, 3, 10 + turn, 2)]
CASES = {
    "one image first": [GLOBAL, *TILE, 5, 6, 7],
    "text before the image": [5, 6, GLOBAL, *TILE, 7, 8],
    "two images": [8, GLOBAL, *TILE, 9, GLOBAL, *TILE, 5, 6],
    "tiles without a token between": [*TILE, *TILE, 5],
    "an image at the end": [5, 6, *TILE],
    "no image": [5, 6, 7, 8],
    "3 x 2 tiles": [*SIX_TILES, 5, 6],
    "5 turns": [1, 4, *SIX_TILES, *TURNS],
}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts(96)


@pytest.fixture(scope="module")
def model(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder: Path = tmp_path_factory.mktemp("published")
    write_checkpoint(folder, parts, **CHANGES_8K)
    return VisionLanguageModel.from_pretrained(folder).eval()


def images_for(*sequences: list[int]) -> Tensor:
    number = sum(ids.count(IMAGE_TOKEN) for ids in sequences) // 4
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("ids", CASES.values(), ids=CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(
    model: VisionLanguageModel, parts: Parts, ids: list[int]
) -> None:
    row, images = torch.tensor([ids]), images_for(ids)
    ours, theirs = model(row, images)[0], placeholder_logits(parts, row, images)
    is_text = row != IMAGE_TOKEN
    torch.testing.assert_close(ours[is_text], theirs[is_text], atol=1e-5, rtol=0)
    assert (ours[~is_text] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_of_all_kinds_gives_each_its_own(
    model: VisionLanguageModel, parts: Parts, side: str
) -> None:
    """And its loss is that of all labels together."""
    sequences = list(CASES.values())
    length = max(map(len, sequences))
    padded, is_real = torch.full((len(sequences), length), 7), torch.zeros(8, length).bool()
    for row, ids in enumerate(sequences):
        where = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        padded[row, where], is_real[row, where] = torch.tensor(ids), True
    images = images_for(*sequences)
    targets = torch.where(is_real & (padded < 30), padded + 1, IGNORED_TARGET)
    logits, loss = model(padded, images, is_real, targets)
    first, losses = 0, []
    for row, ids in enumerate(sequences):
        number = ids.count(IMAGE_TOKEN) // 4
        theirs = placeholder_logits(parts, torch.tensor([ids]), images[first : first + number])[0]
        first += number
        is_text = torch.tensor(ids) != IMAGE_TOKEN
        torch.testing.assert_close(
            logits[row][is_real[row]][is_text], theirs[is_text], atol=1e-5, rtol=0
        )
        is_label = torch.tensor(ids) < 30
        wanted = torch.tensor(ids)[is_label] + 1
        losses.append(F.cross_entropy(theirs[is_label], wanted, reduction="none"))
    torch.testing.assert_close(loss, torch.cat(losses).mean())


def test_greedy_answers_are_those_of_transformers(model: VisionLanguageModel, parts: Parts) -> None:
    """From prompts with tiles in several places, read together and then token by token."""
    prompts = [[*SIX_TILES, 5, 6], [8, *TILE, 9, *TILE, 4]]
    length = max(map(len, prompts))
    padded = torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    images = images_for(*prompts)
    ours = model.generate(padded, images, mask, max_new_tokens=5)
    for ids, own_images, answer in zip(prompts, images.split([7, 2]), ours.tolist(), strict=True):
        sequence = list(ids)
        for _ in answer:
            theirs = placeholder_logits(parts, torch.tensor([sequence]), own_images)
            sequence.append(int(theirs[0, -1].argmax()))
        expected = sequence[len(ids) :]
        end = expected.index(2) if 2 in expected else len(expected)
        assert answer == expected[:end] + [2] * (len(answer) - end)


@pytest.mark.parametrize(
    ("ids", "number", "message"),
    [
        ([5, *TILE[:3], 6], 1, "must hold 4 placeholders together an image"),
        ([5, *TILE[:2], 6, *TILE[:2]], 1, "must hold 4 placeholders together an image"),
        ([5, *TILE, 6], 2, "have places for 1 images, not 2"),
        ([5, 6], 1, "have places for 0 images, not 1"),
    ],
    ids=["too few", "torn apart", "one image more", "no place"],
)
def test_placeholders_that_fit_no_image(
    model: VisionLanguageModel, ids: list[int], number: int, message: str
) -> None:
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(torch.tensor([ids]), torch.rand(number, 3, 32, 32))


def naive_sequence(text: list[int], places: list[int], first_image: int) -> list[tuple[str, int]]:
    """Return a sample's tokens as ("image", token of the row) or ("text", number), in order."""
    sequence: list[tuple[str, int]] = []
    for column in range(len(text) + 1):
        for slot, place in enumerate(places):
            if place == column:
                first = 3 * (first_image + slot)
                sequence += [("image", first + i) for i in range(3)]
        sequence += [("text", token) for token in text[column : column + 1]]
    return sequence


def test_packing_puts_images_where_they_stand() -> None:
    """Against a loop; with an empty sample, a text without image, and padding of every kind."""
    lengths, places = [4, 0, 2, 3, 0], [[0, 0, 2], [0], [], [1, 3], []]
    num_images, num_text, length = 8, 12, 16
    images = ImagePlaces(
        torch.tensor(list(map(len, places))), torch.tensor([place for p in places for place in p])
    )
    packing = pack(torch.tensor(lengths), 3, num_text, length, images, num_images)
    view = packing.pad_index.view(6, length).tolist()
    text = iter(range(1000))
    first_image, is_padding = 0, set(range(3 * num_images + num_text))
    for sample, (number, own) in enumerate(zip(lengths, places, strict=True)):
        sequence = naive_sequence([next(text) for _ in range(number)], own, first_image)
        first_image += len(own)
        tokens = [n if kind == "image" else 3 * num_images + n for kind, n in sequence]
        assert view[sample][: len(tokens)] == tokens
        assert set(view[sample][len(tokens) :]) == {3 * num_images + num_text - 1}
        assert packing.positions[tokens].tolist() == list(range(len(tokens)))
        starts = [sample * length + i for i in range(len(tokens))]
        assert packing.unpad_index[tokens].tolist() == starts
        assert not tokens or packing.last[sample] == tokens[-1]
        is_padding -= set(tokens)
    assert (packing.unpad_index[list(is_padding)] == 5 * length).all()
