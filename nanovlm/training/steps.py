"""The optimizer steps of one trial on this worker, each from its micro-batches to new weights."""

import functools
import logging
import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nanovlm.config.schema import TrainConfig
from nanovlm.data.samples import PreparedSamples, samples_in_order
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.parallel import all_reduce_sum_, gather_objects, rank, world_size
from nanovlm.training.cuda_graphs import Pass, RecordedPasses
from nanovlm.training.forward import ModelInput, answer_loss_sum, unless_out_of_memory
from nanovlm.training.gradient_sum import GradientSum
from nanovlm.training.loader import Loader
from nanovlm.training.meter import Meter
from nanovlm.training.optim import build_optimizer, learning_rate_factor, set_learning_rates
from nanovlm.training.passes import MicroBatchSize, costs_of
from nanovlm.training.state import TrainingState, collect_tensors, restore_tensors

logger = logging.getLogger(__name__)

LOSS_DECAY = 0.95
"""What one step leaves of the steps before it in the smoothed training loss."""


class TrialInterrupted(Exception):
    """Someone asked this trial to end; it ended at the next optimizer step."""


class NonFiniteLossError(Exception):
    """The loss or the gradient became NaN or infinite; the weights are those of the step before."""

    def __init__(self, step: int, quantity: str, value: float) -> None:
        super().__init__(step, quantity, value)
        self.step, self.quantity, self.value = step, quantity, value

    def __str__(self) -> str:
        return f"{self.quantity} is {self.value} at step {self.step}"


class SmoothedLoss:
    """An exponential average without the pull of its start towards 0."""

    def __init__(self, start: TrainingState | None) -> None:
        """Go on from a state; None begins."""
        self.sum = 0.0 if start is None else start.loss_sum
        self.weight = 0.0 if start is None else start.loss_weight

    def add(self, loss: float) -> None:
        self.sum = LOSS_DECAY * self.sum + loss
        self.weight = LOSS_DECAY * self.weight + 1

    @property
    def value(self) -> float:
        return self.sum / self.weight


class Steps:
    """The optimizer steps of one trial on this worker. Only `finish` waits for the device.

    One worker alone launches a step before it has seen the numbers of the one before, so that a
    GPU is never without work: the device itself skips a step that follows on one that failed.
    Several workers first have to agree on whether a step is taken again.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        samples: PreparedSamples,
        config: TrainConfig,
        total_steps: int,
        device: torch.device,
        meter: Meter,
        micro_batch_size: MicroBatchSize | None,
    ) -> None:
        self._model, self._samples, self._config = model, samples, config
        self._total_steps = total_steps
        self._device = device
        self.max_ahead = _max_ahead(device)
        """Steps that may lie unfinished when the next one has been launched."""
        self._is_well = torch.ones((), dtype=torch.bool, device=device)
        self._random = _generator(device)
        self._micro_batch_size = micro_batch_size or MicroBatchSize(device)
        self._costs = None
        if config.vlm.traits.is_tiled:
            self._costs = costs_of(samples.text_lengths, samples.slots.counts, config.vlm)
        self._optimizer = build_optimizer(model, config)
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        is_recorded = _is_recorded(model, device)
        # Nothing here refers to itself, so that a trial's memory is free as soon as it has ended.
        run_pass = functools.partial(_run_pass, model)
        self._pass: Pass = RecordedPasses(run_pass) if is_recorded else run_pass
        trained = (p for p in model.parameters() if p.requires_grad)
        self._gradients = GradientSum(trained, has_fixed_memory=is_recorded)
        self._meter = meter
        self._loader = Loader(
            samples,
            model.config,
            device,
            has_fixed_shapes=model.compiled,
            has_fixed_labels=is_recorded,
            waiting=meter.waiting,
        )

    def fetch(self, step: int) -> None:
        """Begin to bring what `step` starts with to the device."""
        self._loader.fetch(self._micro_batches(step)[0])

    def take(self, step: int, interrupted: bool) -> Tensor:
        """Take the optimizer step `step`; return loss, gradient norm, stop and out of memory.

        float32[4], on the device, the same on all workers; for `finish`. The last two are how many
        workers were interrupted, and how many had not enough memory. Where one is, or loss or norm
        is not finite, the weights stay as they were: the device decides it without the host.
        """
        self._set_learning_rates(step)
        self._random_state = self._random.get_state()
        numbers = self._attempt(step, interrupted)
        indices = self._global_indices(step)
        lengths = self._samples.text_lengths[indices].numpy()
        num_images = self._samples.slots.counts[indices].numpy()
        self._meter.add(lengths, self._num_labels(step), num_images)
        return numbers

    def finish(self, step: int, numbers: Tensor) -> float:
        """Wait for the end of a step, taken again where memory ran out; return its loss.

        Raises TrialInterrupted and NonFiniteLossError.

        Args:
            numbers: what `take` has returned.
        """
        loss, norm, stop, out_of_memory = numbers.tolist()  # waits for the device
        while out_of_memory and not stop:
            loss, norm, stop, out_of_memory = self._take_again(step).tolist()
        if stop:
            raise TrialInterrupted(f"interrupted at step {step}")
        for quantity, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                raise NonFiniteLossError(step, quantity, value)
        return float(loss)

    def _take_again(self, step: int, interrupted: bool = False) -> Tensor:
        """Take a step for which the memory was not enough again, in smaller passes.

        All workers call this together, so they have one limit. Returns what `take` returns; raises
        torch.OutOfMemoryError if passes cannot be smaller.
        """
        largest_share = self._global_indices(step)[:: world_size()]
        if not self._micro_batch_size.halve(
            largest_share, self._config, self._costs_of(largest_share)
        ):
            raise torch.OutOfMemoryError(f"out of memory at step {step}: see the workers' logs")
        self._random.set_state(self._random_state)  # the same dropout in each attempt
        return self._attempt(step, interrupted)

    def state(self, step: int, train_loss: SmoothedLoss) -> TrainingState:
        """Return the state after `step`; all workers call this."""
        return TrainingState(
            step=step,
            loss_sum=train_loss.sum,
            loss_weight=train_loss.weight,
            micro_batch_limit=self._micro_batch_size.limit,
            random=tuple(gather_objects(self._random.get_state())),
            tensors=collect_tensors(self._model, self._optimizer),
        )

    def restore(self, state: TrainingState) -> None:
        """Go on from a state."""
        restore_tensors(state.tensors, self._model, self._optimizer)
        self._random.set_state(state.random[rank()])
        self._micro_batch_size.restore(state.micro_batch_limit)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates of the last step, by parameter group."""
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}

    def _set_learning_rates(self, step: int) -> None:
        config = self._config
        factor = learning_rate_factor(
            step - 1,
            self._total_steps,
            config.warmup_ratio,
            config.min_lr_ratio,
            config.lr_schedule,
        )
        set_learning_rates(self._optimizer, factor)

    def _attempt(self, step: int, interrupted: bool) -> Tensor:
        loss = self._backward(step)
        if loss is None and world_size() == 1:
            return self._take_again(step, interrupted)  # there is nobody to agree with
        loss, stop, out_of_memory = self._sum_over_workers(loss, interrupted)
        norm = get_total_norm([p.grad for p in self._parameters])
        if self._config.max_grad_norm is not None:
            clip_grads_with_norm_(self._parameters, self._config.max_grad_norm, norm)
        is_good = loss.isfinite() & norm.isfinite() & (stop == 0) & (out_of_memory == 0)
        if self.max_ahead:
            is_good = self._is_well = is_good & self._is_well
        # As a gradient scaler does for a fused optimizer: 1 skips the update.
        self._optimizer.found_inf = 1 - is_good.float()  # type: ignore[attr-defined]
        self._optimizer.step()
        return torch.stack([loss, norm, stop, out_of_memory])

    def _backward(self, step: int) -> Tensor | None:
        """Set this worker's part of the gradients of `step`; return its part of the loss.

        None if the memory is not enough. By then others may wait for this worker's gradients, so it
        must not begin again by itself.
        """
        self._gradients.clear()
        return unless_out_of_memory(lambda: self._backward_once(step), f"step {step}")

    def _backward_once(self, step: int) -> Tensor:
        num_labels = torch.full((), float(self._num_labels(step)), device=self._device)
        total = torch.zeros((), device=self._device)
        micro_batches = self._micro_batches(step)
        for number, micro_batch in enumerate(micro_batches, start=1):
            inputs = self._loader.take(micro_batch)
            is_last = number == len(micro_batches)
            with self._gradients.sending() if is_last else nullcontext():
                total += self._pass(inputs, num_labels)
        return total

    def _sum_over_workers(self, loss: Tensor | None, interrupted: bool) -> list[Tensor]:
        """Sum gradients and loss; return loss, and how many were interrupted or had no memory."""
        self._gradients.finish()
        stop = torch.full((), float(interrupted), device=self._device)
        out_of_memory = torch.full((), float(loss is None), device=self._device)
        numbers = [torch.zeros_like(stop) if loss is None else loss, stop, out_of_memory]
        all_reduce_sum_(numbers)
        return numbers

    def _num_labels(self, step: int) -> int:
        """Return how many tokens are learnt in a step, by all workers together."""
        return int(self._samples.num_answer_tokens[self._global_indices(step)].sum())

    def _micro_batches(self, step: int) -> list[np.ndarray]:
        indices = self._indices(step)
        return self._micro_batch_size.split(indices, self._config, self._costs_of(indices))

    def _costs_of(self, indices: np.ndarray) -> np.ndarray | None:
        return None if self._costs is None else self._costs[indices]

    def _indices(self, step: int) -> np.ndarray:
        """Return this worker's samples of a step."""
        return self._global_indices(step)[rank() :: world_size()]

    def _global_indices(self, step: int) -> np.ndarray:
        """Return the samples of a step.

        Where they differ widely the largest come first: so those of a pass are alike, workers get
        about equal shares, and memory runs out at once or not at all.
        """
        stop = step * self._config.batch_size
        start = stop - self._config.batch_size
        indices = samples_in_order(
            len(self._samples), self._config.seed, start, stop, self._samples.mixture
        )
        if self._costs is None:
            return indices
        return indices[np.argsort(-self._costs[indices], kind="stable")]


def _run_pass(model: VisionLanguageModel, inputs: ModelInput, num_answer_tokens: Tensor) -> Tensor:
    """Add a micro-batch's part of the gradients; return its part of the loss."""
    loss = answer_loss_sum(model, inputs) / num_answer_tokens
    loss.backward()
    return loss.detach()


def _is_alone_on_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and world_size() == 1


def _max_ahead(device: torch.device) -> int:
    return 1 if _is_alone_on_gpu(device) else 0


def _is_recorded(model: VisionLanguageModel, device: torch.device) -> bool:
    """Return whether passes are CUDA graphs: where compiled code fixes their shapes to a few, and
    no other worker's gradients travel meanwhile."""
    return model.compiled and not model.config.traits.is_tiled and _is_alone_on_gpu(device)


def _generator(device: torch.device) -> torch.Generator:
    """Return what dropout draws from on `device`."""
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
