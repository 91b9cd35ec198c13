import dataclasses

import pytest
import torch
from torch.nn import functional as F

from nanovlm.data.samples import ImageSlots, PreparedSamples
from nanovlm.evaluation.validation import validation_loss
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import image_input
from tests.tiny import vlm_config

CPU = torch.device("cpu")
VLM = vlm_config(vit_patch_size=4, vit_img_size=8, lm_vocab_size=32)


def random_samples() -> PreparedSamples:
    """Nine samples of 12 down to 4 tokens with answers of 1 to 3 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.arange(12, 3, -1)
    return PreparedSamples(
        images=torch.randint(256, (3, 3, 8, 8), generator=generator, dtype=torch.uint8),
        slots=ImageSlots.one_each(torch.arange(9) % 3),
        tokens=torch.randint(32, (int(lengths.sum()),), generator=generator),
        offsets=F.pad(lengths.cumsum(0), (1, 0)),
        prompt_lengths=lengths - 1 - torch.arange(9) % 3,
    )


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_it_is_the_mean_over_all_answer_tokens(batch_size: int) -> None:
    """Against a sum over the samples one by one, without padding."""
    model, samples = VisionLanguageModel(VLM).eval(), random_samples()
    losses = []
    for i in range(9):
        tokens = samples.tokens[samples.offsets[i] : samples.offsets[i + 1]][None]
        image = image_input(samples.images[samples.slots.index[i]][None], VLM)
        logits, _ = model(tokens[:, :-1], image)
        answer = tokens[0, samples.prompt_lengths[i] :]
        losses.append(F.cross_entropy(logits[0, -len(answer) :], answer, reduction="none"))
    expected = torch.cat(losses).mean().item()
    loss = validation_loss(model, samples, CPU, batch_size)
    assert type(loss) is float
    assert loss == pytest.approx(expected, rel=1e-6)


def test_training_is_not_disturbed() -> None:
    model = VisionLanguageModel(dataclasses.replace(VLM, lm_dropout=0.5)).train()
    state = torch.random.get_rng_state()
    first, second = (validation_loss(model, random_samples(), CPU, 4) for _ in range(2))
    assert first == second  # no dropout takes part
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
