"""What a worker keeps from one trial to the next: the only thing that outlives a trial.

Every entry is kept under exactly those configuration values that it depends on, so a trial never
meets what another configuration left behind; and only a few entries are kept, so that the memory
of a worker stays flat over a long search.
"""

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.data.benchmark import PreparedBenchmark, select_part
from nanovlm.data.build import OnProgress, log_progress
from nanovlm.data.prepared import (
    check_batch_size,
    describe_data,
    images_keys,
    prepare_benchmark,
    prepare_training,
)
from nanovlm.data.samples import PreparedSamples
from nanovlm.data.tokenizer import model_tokenizer
from nanovlm.evaluation.benchmarks import MAIN, for_each
from nanovlm.evaluation.mmstar import check_room, letter_tokens
from nanovlm.models.checkpoint import Snapshot
from nanovlm.models.compiled import find_compile_obstacle
from nanovlm.models.pretrained import load_backbone_weights
from nanovlm.models.vision_language_model import PARTS, VisionLanguageModel
from nanovlm.training.flops import trained_parts
from nanovlm.training.forward import has_bfloat16
from nanovlm.training.frozen_features import encoder_digest, frozen_features
from nanovlm.training.passes import MicroBatchSize
from nanovlm.training.start import architecture, load_checkpoint

logger = logging.getLogger(__name__)

V = TypeVar("V")

NUM_KEPT = 2
"""Entries of each kind that are kept."""

_TRAINING = "training data"
"""Beside the names of benchmarks."""

PROJECTOR = ("MP",)
BACKBONES = tuple(part for part in PARTS if part not in PROJECTOR)


class TrialData(NamedTuple):
    """What a trial reads."""

    train: PreparedSamples
    val: PreparedSamples
    benchmarks: dict[str, PreparedBenchmark]


class Resources:
    """Tokenizers, prepared data and models of one worker, on one device."""

    def __init__(
        self, device: torch.device | str | None = None, on_progress: OnProgress = log_progress
    ) -> None:
        """Hold nothing yet.

        Args:
            device: None takes the first GPU, or the CPU where there is none.
            on_progress: called with how far it is when data has to be prepared.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._on_progress = on_progress
        self._tokenizers = _Recent[Tokenizer]()
        self._training_data = _Recent[tuple[PreparedSamples, PreparedSamples]]()
        self._benchmarks = _Recent[dict[str, PreparedBenchmark]]()
        self._models = _Recent[VisionLanguageModel]()
        self._micro_batch_sizes = _Recent[MicroBatchSize]()
        self._weights = _Recent[Snapshot]()
        self._features = _Recent[dict[str, Tensor]]()
        self._notes = dict[str, None]()  # in the order in which they were made
        self._logged = set[str]()

    def start_trial(self) -> None:
        """Forget the notes of the trial before, and note what this device cannot do."""
        self._notes.clear()
        if self.device.type == "cuda" and not has_bfloat16(self.device):
            name = torch.cuda.get_device_name(self.device)
            self.note(f"{name} has no bfloat16: computing in float32")

    def note(self, text: str) -> None:
        """Remember for the reports what the trial does otherwise than configured.

        It is logged when this worker notes it for the first time.
        """
        self._notes[text] = None
        if text not in self._logged:
            self._logged.add(text)
            logger.warning("%s", text)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noted since the trial started, each text once."""
        return tuple(self._notes)

    def tokenizer(self, vlm: VLMConfig) -> Tokenizer:
        """Return the tokenizer of the model."""
        key = (vlm.lm_tokenizer, vlm.generation, vlm.lm_base_vocab_size)
        return self._tokenizers.get(key, lambda: model_tokenizer(vlm))

    def training_data(self, config: TrainConfig) -> tuple[PreparedSamples, PreparedSamples]:
        """Return the samples to train on and those of the validation loss.

        Raises UserError if the data cannot be read, or is smaller than one batch.
        """
        tokenizer = self.tokenizer(config.vlm)
        train, val = self._training_data.get(
            training_data_key(config),
            lambda: prepare_training(config, tokenizer, self._on_progress),
        )
        check_batch_size(config.batch_size, train)  # which is no part of the key
        return train, val

    def benchmark(self, config: TrainConfig) -> PreparedBenchmark:
        """Return the questions of the main benchmark. Raises UserError as `benchmarks`."""
        return self.benchmarks(config)[MAIN]

    def benchmarks(self, config: TrainConfig) -> dict[str, PreparedBenchmark]:
        """Return the questions of all benchmarks that `config` asks, by their names; the parts of
        one share their images.

        Raises UserError if it cannot be read, its answers are not letters that can be told apart,
        the model has no room for a question, or the part has no question.
        """
        tokenizer = self.tokenizer(config.vlm)

        def prepare(config: TrainConfig) -> PreparedBenchmark:
            benchmark = prepare_benchmark(config, tokenizer, self._on_progress)
            letter_tokens(benchmark, tokenizer)  # fails before the training, not after
            return benchmark

        whole = self._benchmarks.get(benchmarks_key(config), lambda: for_each(config, prepare))

        for benchmark in whole.values():
            check_room(benchmark, config.vlm, tokenizer)  # for which the key does not stand
        return {
            name: select_part(benchmark, config.mmstar_holdout, config.mmstar_part)
            for name, benchmark in whole.items()
        }

    def describe_data(self, config: TrainConfig) -> dict[str, Any]:
        """Return what the data was made from and what was left out of it, once it is prepared."""
        return describe_data(config, self.tokenizer(config.vlm))

    def model(self, config: TrainConfig, checkpoint: str | None = None) -> VisionLanguageModel:
        """Return the model on the device as a trial starts with it.

        The module is the one that an earlier trial with this architecture used, and so is what was
        compiled for it; its weights are replaced, in place: those of `checkpoint`, or of the saved
        model that the configuration resumes from, or else the initial ones of `config.seed`, with
        pretrained backbones if the configuration wants them.

        The files of the saved model and of the backbones are read once and their weights kept in
        memory: a worker does not see later changes of these files.

        Args:
            checkpoint: folder that a trial has written; read at each call.

        With `config.compile` on a platform that cannot compile, the model is not compiled, and
        that is noted.

        Raises:
            UserError: a file is missing, or does not fit the configuration.
        """
        compiled = config.compile and self._can_compile()
        model = self._models.get((config.vlm, compiled), lambda: self._new_model(config, compiled))
        if checkpoint is not None:
            load_checkpoint(model, checkpoint)
        elif config.resume_from_vlm_checkpoint:
            name = config.vlm.vlm_checkpoint_path
            self._set_weights(model, config, PARTS, lambda: load_checkpoint(model, name))
        elif config.vlm.vlm_load_backbone_weights:
            self._set_weights(model, config, BACKBONES, lambda: load_backbone_weights(model))
            model.initialize(config.seed, PROJECTOR)
        else:
            model.initialize(config.seed)
        return model

    def data(
        self, config: TrainConfig, model: VisionLanguageModel, checkpoint: str | None = None
    ) -> TrialData:
        """Return the data of a trial that starts with `model`, as `model()` returned it.

        With `config.cache_vision_features` and a frozen vision encoder, what that makes of each
        image stands in the place of the images.

        Raises UserError as `training_data` and `benchmark`, or if the disk is too full.
        """
        train, val = self.training_data(config)
        benchmarks = self.benchmarks(config)
        if not config.cache_vision_features or config.peak_learning_rates["vision_backbone"]:
            return TrialData(train, val, benchmarks)
        if config.vlm.vit_dropout:
            self.note(
                f"cache_vision_features: vlm.vit_dropout={config.vlm.vit_dropout} makes other "
                "features at each pass, so they are computed each time"
            )
            return TrialData(train, val, benchmarks)

        def compute() -> dict[str, Tensor]:
            tokenizer = self.tokenizer(config.vlm)
            keys = for_each(config, lambda own: images_keys(own, tokenizer))
            images = {name: (benchmarks[name].images, own) for name, (_, own) in keys.items()}
            images[_TRAINING] = (train.images, keys[MAIN][0])
            return {
                name: frozen_features(model, pixels, key, self.device, self._on_progress)
                for name, (pixels, key) in images.items()
            }

        encoder = _weights_key(config) if checkpoint is None else encoder_digest(model)
        key = (encoder, training_data_key(config), benchmarks_key(config))
        features = self._features.get(key, compute)
        return TrialData(
            dataclasses.replace(train, images=features[_TRAINING]),
            dataclasses.replace(val, images=features[_TRAINING]),
            {
                name: dataclasses.replace(benchmark, images=features[name])
                for name, benchmark in benchmarks.items()
            },
        )

    def micro_batch_size(self, config: TrainConfig) -> MicroBatchSize:
        """Return what earlier trials of such a model have found to fit into the memory.

        How much is dropped makes no difference, but whether anything is does.
        """
        drops = config.vlm.vit_dropout > 0, config.vlm.lm_dropout > 0
        vlm = dataclasses.replace(config.vlm, vit_dropout=0.0, lm_dropout=0.0)
        key = (vlm, drops, config.compile, trained_parts(config))
        size = self._micro_batch_sizes.get(key, lambda: MicroBatchSize(self.device, self.note))
        size.begin_trial()
        return size

    def _set_weights(
        self,
        model: VisionLanguageModel,
        config: TrainConfig,
        parts: Sequence[str],
        load: Callable[[], None],
    ) -> None:
        """Copy the weights that `config` starts with into `parts` of `model`.

        Args:
            load: reads them into the model, if they are not kept from an earlier trial.
        """

        def read() -> Snapshot:
            load()
            return Snapshot(model, parts)

        self._weights.get(_weights_key(config), read).restore(model)

    def _can_compile(self) -> bool:
        """Return whether models can be compiled here, and note why not."""
        obstacle = find_compile_obstacle(self.device.type)
        if obstacle is not None:
            self.note(f"compile=true: {obstacle}; the model runs uncompiled")
        return obstacle is None

    def _new_model(self, config: TrainConfig, compiled: bool) -> VisionLanguageModel:
        with self.device:
            return VisionLanguageModel(config.vlm, compiled=compiled)


def _weights_key(config: TrainConfig) -> Hashable:
    """Return the values that the weights depend on with which a vision encoder starts.

    Another dropout or prompt length makes another model, with the same weights.
    """
    vlm, names = config.vlm, tuple[str | int, ...]()
    if config.resume_from_vlm_checkpoint:
        names = (vlm.vlm_checkpoint_path,)
    elif vlm.vlm_load_backbone_weights:
        names = (vlm.vit_model_type, vlm.lm_model_type)
    else:
        names = ("seed", config.seed)
    return (*names, *architecture(vlm).items())


def training_data_key(config: TrainConfig) -> Hashable:
    """Return the values that the prepared training data depends on."""
    return (
        config.train_dataset_path,
        config.train_dataset_name,
        config.train_dataset_weights,
        config.stream_dataset,
        config.data_cutoff_idx,
        config.val_ratio,
        config.turns,
        tuple(config.min_ratings.items()),
        config.max_bad_fraction,
        config.vlm.traits.name,
        config.vlm.lm_tokenizer,
        config.vlm.lm_base_vocab_size,
        config.vlm.max_text_length,
        config.vlm.lm_eos_token_id,
        config.vlm.vit_img_size,
        config.vlm.image_resampling,
        config.max_images_per_example if config.vlm.traits.is_tiled else None,
        *_tiling_key(config.vlm),
    )


def benchmarks_key(config: TrainConfig) -> Hashable:
    """Return the values that all prepared benchmarks depend on."""
    return (benchmark_key(config), config.more_benchmarks)


def benchmark_key(config: TrainConfig) -> Hashable:
    """Return the values that the prepared benchmark depends on."""
    return (
        config.test_dataset_path,
        config.vlm.traits.name,
        config.vlm.lm_tokenizer,
        config.vlm.lm_base_vocab_size,
        config.vlm.lm_eos_token_id,
        config.vlm.vit_img_size,
        config.vlm.image_resampling,
        *_tiling_key(config.vlm),
    )


def _tiling_key(vlm: VLMConfig) -> tuple[Hashable, ...]:
    """Return the values that conversations and tiles depend on, which only 8k has."""
    if not vlm.traits.is_tiled:
        return ()
    tiling = (vlm.max_img_size, vlm.resize_to_max_side_len, vlm.num_image_tokens)
    return (vlm.lm_chat_template, *tiling)


class _Recent(Generic[V]):
    """The few values that were used last, by their key."""

    def __init__(self) -> None:
        self._values: OrderedDict[Hashable, V] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the value of `key`, made now if it is not here; the oldest makes room first."""
        if key not in self._values:
            if len(self._values) >= NUM_KEPT:
                self._values.popitem(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]
