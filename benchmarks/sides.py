"""The two sides of the training benchmark: each takes steps when it is asked to."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch._dynamo.utils import counters

from benchmarks.padded import padded_batch, peer_optimizer, peer_step
from benchmarks.peer import Peer
from benchmarks.setups import Texts
from nanovlm.config.schema import TrainConfig
from nanovlm.messages import Speed
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.forward import choose_algorithms
from nanovlm.training.loop import train

NUM_PEER_BATCHES = 4


class Run(NamedTuple):
    """Some steps that were taken."""

    num_useful: int
    """Samples that carry a label."""
    seconds: float
    peak_bytes: int
    """Highest memory of the GPU in use meanwhile, both sides' weights included; 0 on CPU."""
    num_graphs: int
    """Graphs that torch.compile made meanwhile; while it does, speed says nothing."""

    @property
    def speed(self) -> float:
        """Useful samples a second."""
        return self.num_useful / self.seconds


class OurSide:
    """`train` on the samples that fit, stopped after each round."""

    def __init__(
        self,
        model: VisionLanguageModel,
        config: TrainConfig,
        texts: Texts,
        device: torch.device,
        rounds: Sequence[int],
    ) -> None:
        """Begin; `rounds` are the steps of each `run` to come."""
        self._rounds = iter(rounds)
        self.model = model
        self._device, self._config = device, config
        ends = [sum(rounds[: i + 1]) * config.batch_size for i in range(len(rounds))]
        samples = texts.fitting(config.vlm.max_text_length).prepared()
        self._training = train(model, samples, config, ends, device=device)
        self.speeds: list[Speed] = []
        """What the loop itself has measured, by round."""
        self.losses: list[float] = []
        """The smoothed loss after each round."""

    def run(self) -> Run:
        """Take the steps of the next round."""
        num_steps = next(self._rounds)
        choose_algorithms(self._config, self._device)  # as a trial does; the peer is free of it
        with _Clock(self._device) as clock:
            progress = next(self._training)
        self.speeds.append(progress.speed)
        self.losses.append(progress.train_loss)
        torch.use_deterministic_algorithms(False)
        return Run(
            num_steps * self._config.batch_size, clock.seconds, clock.peak_bytes, clock.num_graphs
        )


class PeerSide:
    """The plain loop, as nanoVLM v0.1 has it."""

    def __init__(
        self,
        peer: Peer,
        config: TrainConfig,
        texts: Texts,
        device: torch.device,
        rounds: Sequence[int],
        compiled: bool,
    ) -> None:
        self._rounds = iter(rounds)
        self._device, self.batch_size = device, config.batch_size
        self._optimizer = peer_optimizer(peer, config)
        self._peer: torch.nn.Module = torch.compile(peer) if compiled else peer  # type: ignore[assignment]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(config.seed))
        self._batches = [
            padded_batch(texts, indices.tolist(), config.vlm.max_text_length, "left")
            for indices in order.split(config.batch_size)[:NUM_PEER_BATCHES]
        ]
        peer.train()

    def run(self) -> Run:
        """Take the steps of the next round."""
        num_useful = 0
        with _Clock(self._device) as clock:
            for step in range(next(self._rounds)):
                batch = self._batches[step % len(self._batches)]
                peer_step(self._peer, self._optimizer, batch.to(self._device))
                num_useful += batch.num_useful
        return Run(num_useful, clock.seconds, clock.peak_bytes, clock.num_graphs)


class _Clock:
    """Seconds, highest memory and compilations of what is done within, the GPU's work included."""

    seconds = 0.0
    peak_bytes = 0
    num_graphs = 0

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def __enter__(self) -> "_Clock":
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._graphs_before = counters["stats"]["unique_graphs"]
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated()
        self.seconds = time.perf_counter() - self._started
        self.num_graphs = counters["stats"]["unique_graphs"] - self._graphs_before
