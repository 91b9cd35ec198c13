"""However a batch passes through the model, its loss and its gradients are the same.

That two workers give the same as one is tested in test_several_workers.py.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks.padded import padded_batch, peer_loss
from benchmarks.peer import Peer, plain_name, renamed
from benchmarks.setups import Texts, make_texts
from nanovlm.config.schema import TrainConfig
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.loop import train
from tests.tiny import vlm_config

CPU = torch.device("cpu")
VLM = vlm_config(lm_n_blocks=2, vit_n_blocks=2)
NUM_SAMPLES = 12
CONFIG = TrainConfig(
    batch_size=NUM_SAMPLES,
    epochs=1,
    warmup_ratio=0.0,
    max_grad_norm=None,
    compile=False,
    vlm=VLM,
)


def texts() -> Texts:
    """Twelve samples of 15 to 67 tokens: one step takes them all, in whatever order."""
    return make_texts(VLM, num_samples=20, num_images=7).fitting(VLM.lm_max_length)


@pytest.fixture(scope="module")
def expected() -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of transformers' modules over one batch, padded to 90 tokens."""
    peer = Peer(VLM)
    peer.copy_weights(VisionLanguageModel(VLM, seed=1))
    loss = peer_loss(peer, padded_batch(texts(), range(NUM_SAMPLES), 90, "right"))
    loss.backward()
    gradients = {plain_name(n): p.grad for n, p in peer.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("has_fixed_shapes", [False, True], ids=["as_they_are", "fixed_shapes"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 8, "auto"])
def test_loss_and_gradients(
    micro_batch_size: int, has_fixed_shapes: bool, expected: tuple[float, dict[str, Tensor]]
) -> None:
    config = dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size)
    model = VisionLanguageModel(VLM, seed=1)
    model.compiled = has_fixed_shapes  # the shapes of compiled code, without the compiler
    (report,) = train(model, texts().prepared(), config, (), device=CPU)
    loss, expected_gradients = expected
    assert report.train_loss == pytest.approx(loss, abs=1e-5)
    gradients = dict(
        renamed((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    )
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        reference = expected_gradients[name].view_as(gradient)
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-5, msg=name)
    assert max(gradient.abs().max().item() for gradient in gradients.values()) > 0.01
