"""Answers to a benchmark in nanoVLM v0.1's way: padded, in float32, without a cache."""

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peer import Peer
from benchmarks.setups import EOS
from nanovlm.data.benchmark import PreparedBenchmark
from nanovlm.evaluation.mmstar_result import ItemAnswer

BATCH_SIZE = 32
NUM_NEW_TOKENS = 5
LETTERS = "ABCD"


@torch.no_grad()
def reference_answers(
    peer: Peer, benchmark: PreparedBenchmark, tokenizer: Tokenizer, device: torch.device
) -> list[ItemAnswer]:
    """Return the answer to each question, in the benchmark's order."""
    peer.eval()
    letter_tokens = torch.tensor([tokenizer.token_to_id(letter) for letter in LETTERS])
    answers: list[ItemAnswer] = []
    for items in torch.arange(len(benchmark)).split(BATCH_SIZE):
        input_ids, mask = left_padded([benchmark.prompt(item) for item in items.tolist()])
        images = benchmark.images[benchmark.slots.index[items]]
        tokens, first_logits = generate(
            peer, input_ids.to(device), images.to(device), mask.to(device)
        )
        log_probabilities = first_logits.cpu()[:, letter_tokens].log_softmax(dim=1)
        for item, row, weights in zip(
            items.tolist(), tokens.tolist(), log_probabilities, strict=True
        ):
            answer = row[: row.index(EOS)] if EOS in row else row
            answers.append(
                ItemAnswer(
                    output=tokenizer.decode(answer),
                    letter=LETTERS[int(weights.argmax())],
                    letter_nll=-weights[LETTERS.index(benchmark.answers[item])].item(),
                )
            )
    return answers


def left_padded(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return int64[B, T] and which of it is real, int64[B, T]; T is the longest prompt."""
    longest = max(map(len, prompts))
    padded = [F.pad(prompt, (longest - len(prompt), 0), value=EOS) for prompt in prompts]
    real = [F.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts]
    return torch.stack(padded), torch.stack(real)


def generate(peer: Peer, input_ids: Tensor, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that follow, int64[B, 5], and the logits of the first, float[B, V].

    Args:
        input_ids: int64[B, T]
        images: uint8[B, 3, S, S]
        mask: int64[B, T], 0 for padding.
    """
    embeddings = peer.embed(input_ids, images)  # the image comes before the padding
    mask = F.pad(mask, (peer.config.num_image_tokens, 0), value=1)
    tokens, logits = [], []
    for _ in range(NUM_NEW_TOKENS):
        hidden = peer.decoder.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=mask.cumsum(dim=1) - 1,
            use_cache=False,
        ).last_hidden_state
        logits.append(peer.decoder.lm_head(hidden[:, -1]))
        tokens.append(logits[-1].argmax(dim=1))
        embedded = peer.decoder.get_input_embeddings()(tokens[-1][:, None])
        embeddings = torch.cat((embeddings, embedded), dim=1)
        mask = F.pad(mask, (0, 1), value=1)
    return torch.stack(tokens, dim=1), logits[0]
