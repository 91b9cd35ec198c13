"""The whole model: names, order of image and text, padding, loss, initial weights, compilation."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config.schema import VLMConfig
from nanovlm.models.packing import pack
from nanovlm.models.vision_language_model import PARTS, VisionLanguageModel


def tokens_and_image(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(50, (batch, length), generator=generator)
    return ids, torch.rand(batch, 3, 32, 32, generator=generator)


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of nanoVLM-222M v0.1 as it is published."""
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.conv.weight": (768, 3, 16, 16),
        "vision_encoder.patch_embedding.conv.bias": (768,),
        "vision_encoder.patch_embedding.position_embedding": (1, 196, 768),
        "vision_encoder.layer_norm.weight": (768,),
        "vision_encoder.layer_norm.bias": (768,),
        "MP.proj.weight": (576, 3072),
        "decoder.token_embedding.weight": (49152, 576),
        "decoder.rotary_embd.inv_freq": (32,),
        "decoder.norm.weight": (576,),
        "decoder.head.weight": (49152, 576),
    }
    vit_linear = {"attn.qkv_proj": (2304, 768), "attn.out_proj": (768, 768)}
    vit_linear |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    lm_linear = {"attn.q_proj": (576, 576), "attn.k_proj": (192, 576), "attn.v_proj": (192, 576)}
    lm_linear |= {"attn.out_proj": (576, 576), "mlp.gate_proj": (1536, 576)}
    lm_linear |= {"mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536)}
    for i in range(12):
        block = f"vision_encoder.blocks.{i}"
        for norm in ("ln1", "ln2"):
            shapes |= {f"{block}.{norm}.weight": (768,), f"{block}.{norm}.bias": (768,)}
        for name, shape in vit_linear.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    for i in range(30):
        block = f"decoder.blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (576,), f"{block}.norm2.weight": (576,)}
        shapes |= {f"{block}.{name}.weight": shape for name, shape in lm_linear.items()}
    return shapes


def test_default_is_nanovlm_222m() -> None:
    with torch.device("meta"):
        model = VisionLanguageModel(VLMConfig())
    assert sum(p.numel() for p in model.parameters()) == 222_081_600
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == published_shapes()
    assert len(shapes) == 424


def test_image_stands_before_the_text(tiny: VLMConfig) -> None:
    model = VisionLanguageModel(tiny)
    ids, image = tokens_and_image(2, 5)
    row = F.pad(ids.flatten(), (0, 1))
    x = model.embed(row, image)
    assert torch.equal(x[:8], model.MP(model.vision_encoder(image)).flatten(0, 1))
    assert torch.equal(x[8:], model.decoder.token_embedding.weight[row])
    packing = pack(torch.tensor([5, 5]), 4, 11)
    hidden = model.hidden_states(row, image, packing)
    assert torch.equal(hidden, model.decoder(x, packing)[8:])
    logits = model.decoder.head(hidden[:-1]).unflatten(0, (2, 5))
    assert torch.equal(model(ids, image)[0], logits)


@torch.no_grad()
def test_every_text_token_sees_the_image(tiny: VLMConfig) -> None:
    model = VisionLanguageModel(tiny)
    ids, image = tokens_and_image(1, 5)
    other = image.clone()
    other[..., -1, -1] += 0.5
    difference = (model(ids, image)[0] - model(ids, other)[0]).abs().amax(dim=-1)
    assert (difference > 1e-4).all()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(
    tiny: VLMConfig, randomize: Callable[[nn.Module], None], side: str
) -> None:
    model = VisionLanguageModel(tiny)
    randomize(model)
    ids, image = tokens_and_image(2, 7)
    lengths = (7, 3)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, slice(7 - length, 7) if side == "left" else slice(length)] = True
    padded = model(ids, image, mask)[0]
    for row in range(2):
        alone = model(ids[row, mask[row]][None], image[row : row + 1])[0][0]
        torch.testing.assert_close(padded[row, mask[row]], alone, atol=1e-5, rtol=1e-5)


def test_loss_is_the_mean_over_labels_alone(tiny: VLMConfig) -> None:
    model = VisionLanguageModel(tiny)
    ids, image = tokens_and_image(2, 6)
    targets = torch.full((2, 6), -100)
    targets[0, 3], targets[0, 4], targets[1, 5] = 7, 0, 49
    logits, loss = model(ids, image, targets=targets)
    log_probabilities = logits.log_softmax(-1)
    picked = log_probabilities[0, 3, 7] + log_probabilities[0, 4, 0] + log_probabilities[1, 5, 49]
    torch.testing.assert_close(loss, -picked / 3)
    assert model(ids, image)[1] is None
    assert model(ids, image, targets=torch.full((2, 6), -100))[1].item() == 0.0


def test_gradients_reach_every_parameter(tiny: VLMConfig) -> None:
    model = VisionLanguageModel(tiny)
    ids, image = tokens_and_image(2, 6)
    model(ids, image, targets=ids)[1].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("tied", [True, False])
def test_initialize_repeats_to_the_bit_in_place(tiny: VLMConfig, tied: bool) -> None:
    config = dataclasses.replace(tiny, lm_tie_weights=tied)
    before = torch.get_rng_state()
    model = VisionLanguageModel(config, seed=5)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan)
    model.initialize(5)
    after = model.state_dict()
    assert [name for name in expected if not torch.equal(after[name], expected[name])] == []
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == places
    assert (model.decoder.head.weight is model.decoder.token_embedding.weight) == tied
    model.initialize(6)
    same = [name for name in expected if torch.equal(model.state_dict()[name], expected[name])]
    assert all("norm" in n or "ln" in n or "bias" in n or "inv_freq" in n for n in same)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_part_is_drawn_for_itself(tiny: VLMConfig) -> None:
    expected = VisionLanguageModel(tiny, seed=6).state_dict()
    for part in PARTS:
        model = VisionLanguageModel(tiny, seed=5)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.initialize(6, (part,))
        for name, tensor in model.state_dict().items():
            source = expected if name.startswith(f"{part}.") else before
            assert torch.equal(tensor, source[name]), (part, name)
    embedding, queries, projector = (
        expected[name].flatten()[:100] / expected[name].std()
        for name in ("decoder.token_embedding.weight",
                     "vision_encoder.patch_embedding.conv.weight", "MP.proj.weight")
    )  # fmt: skip
    for one, other in ((embedding, queries), (queries, projector), (embedding, projector)):
        assert torch.corrcoef(torch.stack((one, other)))[0, 1].abs() < 0.5


def test_initial_weights_have_the_scale_of_their_width(tiny: VLMConfig) -> None:
    weights = VisionLanguageModel(dataclasses.replace(tiny, lm_n_blocks=8)).state_dict()
    expected = {
        "vision_encoder.patch_embedding.conv.weight": (3 * 8 * 8) ** -0.5,
        "vision_encoder.patch_embedding.position_embedding": 32**-0.5,
        "vision_encoder.blocks.1.attn.qkv_proj.weight": 32**-0.5,
        "vision_encoder.blocks.1.mlp.fc2.weight": (128 * 4) ** -0.5,
        "MP.proj.weight": 128**-0.5,
        "decoder.token_embedding.weight": 32**-0.5,
        "decoder.blocks.0.mlp.up_proj.weight": 32**-0.5,
        "decoder.blocks.0.mlp.down_proj.weight": (64 * 16) ** -0.5,
        "decoder.blocks.0.attn.out_proj.weight": (32 * 16) ** -0.5,
        "decoder.head.weight": 32**-0.5,
    }
    measured = {name: weights[name].std().item() for name in expected}
    assert measured == pytest.approx(expected, rel=0.15)
    assert (weights["vision_encoder.blocks.0.ln1.weight"] == 1).all()
    assert (weights["vision_encoder.blocks.0.mlp.fc1.bias"] == 0).all()


def test_an_initial_model_knows_nothing_yet(tiny: VLMConfig) -> None:
    model = VisionLanguageModel(tiny).eval()
    ids, image = tokens_and_image(8, 30)
    targets = tokens_and_image(9, 30)[0][1:]
    assert model(ids, image, targets=targets)[1].item() == pytest.approx(
        math.log(50) + 0.5, abs=0.3
    )


def test_bfloat16_autocast_stays_near_float32(tiny: VLMConfig) -> None:
    model = VisionLanguageModel(tiny)
    ids, image = tokens_and_image(2, 6)
    expected, exact_loss = model(ids, image, targets=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(ids, image, targets=ids)
        generated = model.generate(ids, image)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)
    assert loss.item() == pytest.approx(exact_loss.item(), abs=0.02)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert generated.shape == (2, 5)
