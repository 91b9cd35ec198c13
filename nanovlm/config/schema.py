"""The configuration of a model and of its training; the template of every search space.

`VLMConfig` describes the model, `TrainConfig` one training run of it. Types and bounds are checked
on construction, wherever the values come from.
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from nanovlm.config.fields import (
    STRICT,
    Channels,
    NameList,
    PathList,
    PositiveChannels,
    Ratio,
    Weights,
    tunable,
)
from nanovlm.config.generations import (
    GENERATIONS,
    MAX_TILES_A_SIDE,
    TILED_KEYS,
    Generation,
    GenerationName,
)

LearningRateSchedule = Literal["cosine", "linear", "constant"]
Rating = Annotated[int, Field(ge=1, le=5)]
MIN_RATING_KEYS = {
    kind: f"{kind}_min_rating"
    for kind in ("relevance", "image_correspondence", "visual_dependency", "formatting")
}
"""By the kind of FineVision's ratings, the key of the least one that is wanted."""
Freeze = Literal["none", "vision_encoder", "backbones"]
BenchmarkPart = Literal["all", "search", "holdout"]
MMStarRules = Literal["lmms-eval-0.7.2", "lmms-eval-0.7.1"]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class VLMConfig:
    """The model: the keys of a published nanoVLM `config.json`, its generation and how it wants
    its images.

    The defaults are nanoVLM-222M's, but for the images: those are SigLIP's own. A published
    `config.json` has no `image_` keys and means values from 0 to 1. Keys of v0.2 that follow from
    others are properties (`config/generations.py`).
    """

    generation: GenerationName = "v0.1"
    """Of nanoVLM: v0.1 as nanoVLM-222M, v0.2 as nanoVLM-450M, 8k as nanoVLM-460M-8k."""

    vit_hidden_dim: PositiveInt = 768
    vit_inter_dim: PositiveInt | None = None
    """Width of the vision MLP; None means 4 x vit_hidden_dim. Read it as `vit_mlp_dim`."""
    vit_patch_size: PositiveInt = 16
    vit_img_size: PositiveInt = 224
    """Side of the square input in pixels: the image, or in 8k a tile of it."""
    vit_n_heads: PositiveInt = 12
    vit_dropout: Ratio = tunable(0.0, "uniform", 0.0, 0.3)
    vit_n_blocks: PositiveInt = 12
    vit_ln_eps: PositiveFloat = 1e-6
    vit_cls_flag: Literal[False] = False
    """SigLIP has no class token, and the pixel shuffle needs the whole patch grid."""
    vit_model_type: str = "google/siglip-base-patch16-224"

    image_mean: Channels = (0.5, 0.5, 0.5)
    """Of red, green and blue, on a scale from 0 to 1; the vision encoder reads (x - mean) / std.
    As in preprocessor_config.json of google/siglip-base-patch16-224, like the next two."""
    image_std: PositiveChannels = (0.5, 0.5, 0.5)
    image_resampling: Literal["bilinear", "bicubic"] = "bicubic"
    """The filter that squashes an image to `vit_img_size`: in 8k the one to its global tile."""
    max_img_size: PositiveInt | None = None
    """8k alone, which needs it: longest side of an image in pixels before it is cut into tiles of
    `vit_img_size`, a multiple of that."""
    resize_to_max_side_len: bool = False
    """8k alone: smaller images are enlarged to `max_img_size`, too."""

    lm_hidden_dim: PositiveInt = 576
    lm_inter_dim: PositiveInt = 1536
    lm_rms_eps: PositiveFloat = 1e-5
    lm_re_base: PositiveFloat = 100_000
    """Base of the rotary embedding's frequencies (theta)."""
    lm_max_position_embeddings: PositiveInt = 8192
    lm_vocab_size: PositiveInt = 49_152
    lm_n_heads: PositiveInt = 9
    lm_n_kv_heads: PositiveInt = 3
    lm_dropout: Ratio = tunable(0.0, "uniform", 0.0, 0.3)
    lm_n_blocks: PositiveInt = 30
    lm_attn_scaling: PositiveFloat = 1.0
    """Factor on the rotary cosines and sines."""
    lm_max_length: PositiveInt = 79
    """Longest text of a sample in tokens: prompt, answer and EOS. In v0.1 the image comes on top,
    in v0.2 and 8k its tokens count too. Read it as `max_text_length`."""
    lm_use_tokens: Literal[False] = False
    """The decoder reads embeddings, since image and text are joined before it."""
    lm_tie_weights: bool = True
    lm_model_type: str = "HuggingFaceTB/SmolLM2-135M"
    lm_tokenizer: str = "HuggingFaceTB/cosmo2-tokenizer"
    lm_eos_token_id: Annotated[int, Field(ge=0)] = 0
    lm_chat_template: str | None = None
    """8k alone: the text in Jinja that makes conversations of messages; None takes the
    tokenizer's own."""

    mp_pixel_shuffle_factor: PositiveInt = tunable(2, "choice", 1, 2)

    vlm_load_backbone_weights: bool = True
    """Start from the pretrained ViT and decoder; False starts from random weights."""
    vlm_checkpoint_path: str = "checkpoints/nanoVLM-222M"
    hf_repo_name: str = "nanoVLM"
    """A label in files of v0.2: where nanoVLM's own program would upload the model."""

    def __post_init__(self) -> None:
        _divides("vit_patch_size", self.vit_patch_size, "vit_img_size", self.vit_img_size)
        _divides("vit_n_heads", self.vit_n_heads, "vit_hidden_dim", self.vit_hidden_dim)
        grid = self.vit_img_size // self.vit_patch_size
        factor = self.mp_pixel_shuffle_factor
        _divides("mp_pixel_shuffle_factor", factor, "the side of the patch grid", grid)
        _divides("2 x lm_n_heads", 2 * self.lm_n_heads, "lm_hidden_dim", self.lm_hidden_dim)
        _divides("lm_n_kv_heads", self.lm_n_kv_heads, "lm_n_heads", self.lm_n_heads)
        if self.lm_eos_token_id >= self.lm_base_vocab_size:
            raise ValueError(
                f"lm_eos_token_id must be below lm_vocab_size{self.traits.less_extra_tokens}, "
                f"got {self.lm_eos_token_id} and {self.lm_vocab_size}"
            )
        self._check_tiles()
        self._check_lengths()

    def _check_tiles(self) -> None:
        if not self.traits.is_tiled:
            given = sorted(key for key in TILED_KEYS if getattr(self, key) not in (None, False))
            if given:
                raise ValueError(
                    f"{', '.join(given)}: only models of generation 8k have tiles and "
                    f"conversations, this one is of {self.generation}"
                )
            return
        largest = MAX_TILES_A_SIDE * self.vit_img_size
        size = self.max_img_size
        if size is None or size % self.vit_img_size or size > largest:
            raise ValueError(
                f"max_img_size must be a multiple of vit_img_size={self.vit_img_size} up to "
                f"{largest} in generation {self.generation}, got {size}"
            )

    def _check_lengths(self) -> None:
        if self.lm_max_length <= self.num_image_tokens and self.traits.length_includes_image:
            raise ValueError(
                f"lm_max_length={self.lm_max_length} leaves no room for text: in generation "
                f"{self.generation} it includes the {self.num_image_tokens} image tokens"
            )
        on_top = 0 if self.traits.length_includes_image else self.num_image_tokens
        if on_top + self.lm_max_length > self.lm_max_position_embeddings:
            what = f"lm_max_length={self.lm_max_length} exceeds"
            if on_top:
                what = f"{on_top} image tokens + {what.removesuffix('s')}"
            raise ValueError(f"{what} lm_max_position_embeddings={self.lm_max_position_embeddings}")

    @property
    def traits(self) -> Generation:
        """What all models of the generation have in common."""
        return GENERATIONS[self.generation]

    @property
    def vit_mlp_dim(self) -> int:
        return self.vit_inter_dim or 4 * self.vit_hidden_dim

    @property
    def num_patches(self) -> int:
        """Patches that the vision encoder cuts an image, or a tile, into."""
        return (self.vit_img_size // self.vit_patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one image, in 8k one tile, becomes in the decoder's sequence."""
        side = self.vit_img_size // self.vit_patch_size // self.mp_pixel_shuffle_factor
        return side * side

    @property
    def max_text_length(self) -> int:
        """Longest text of a sample in tokens, without those of its image; in 8k, where the number
        of tiles differs, with those of all tiles."""
        has_one_image = self.traits.length_includes_image and not self.traits.is_tiled
        return self.lm_max_length - has_one_image * self.num_image_tokens

    @property
    def mp_image_token_length(self) -> int:
        """What v0.2 calls `num_image_tokens`."""
        return self.num_image_tokens

    @property
    def vlm_extra_tokens(self) -> dict[str, str]:
        """Tokens that are not the tokenizer's, name and spelling; none stands in a text here."""
        return dict(self.traits.extra_tokens)

    @property
    def extra_token_amount(self) -> int:
        return len(self.traits.extra_tokens)

    @property
    def lm_base_vocab_size(self) -> int:
        """The vocabulary that is left for the tokenizer's tokens."""
        return self.lm_vocab_size - self.extra_token_amount

    @property
    def image_token_id(self) -> int:
        """The placeholder of an image token, the first of the extra tokens."""
        return self.lm_base_vocab_size


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        raise ValueError(f"{divisor_name} must divide {name}, got {divisor} and {value}")


CAULDRON_NAMES = (
    "ai2d", "aokvqa", "chart2text", "chartqa", "clevr", "cocoqa", "datikz", "diagram_image_to_text",
    "docvqa", "dvqa", "figureqa", "finqa", "geomverse", "hateful_memes", "hitab", "iam", "iconqa",
    "infographic_vqa", "intergps", "localized_narratives", "mapqa", "multihiertt", "ocrvqa",
    "plotqa", "raven", "rendered_text", "robut_sqa", "robut_wikisql", "robut_wtq", "scienceqa",
    "screen2words", "st_vqa", "tabmwp", "tallyqa", "tat_qa", "textcaps", "textvqa", "tqa",
    "vistext", "visual7w", "visualmrc", "vqarad", "vqav2", "vsr", "websight",
)  # fmt: skip
"""The sub-sets of the_cauldron that nanoVLM v0.1 trains on."""


STAND_INS = {"lr_vision_backbone": "lr_backbones", "lr_language_backbone": "lr_backbones"}
"""Keys whose null stands for the value of another key."""

FROZEN_RATES: dict[Freeze, tuple[str, ...]] = {
    "none": (),
    "vision_encoder": ("lr_vision_backbone",),
    "backbones": ("lr_vision_backbone", "lr_language_backbone"),
}
"""The learning rates of what each value of `freeze` leaves as it is."""


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrainConfig:
    """One training run. The names and defaults that nanoVLM has are nanoVLM v0.1's."""

    lr_mp: NonNegativeFloat = tunable(2e-3, "log_uniform", 1e-5, 1e-1)
    """Peak learning rate of the modality projector; 0 freezes it."""
    lr_backbones: NonNegativeFloat = tunable(1e-4, "log_uniform", 1e-6, 1e-2)
    """Peak learning rate of the vision encoder and the decoder where they have none of their own;
    0 freezes them."""
    lr_vision_backbone: NonNegativeFloat | None = tunable(None, "log_uniform", 1e-6, 1e-2)
    """Peak learning rate of the vision encoder, 0 freezes it; None takes `lr_backbones`."""
    lr_language_backbone: NonNegativeFloat | None = tunable(None, "log_uniform", 1e-6, 1e-2)
    """Peak learning rate of the decoder, 0 freezes it; None takes `lr_backbones`."""
    freeze: Freeze = tunable("none", "choice", "none", "vision_encoder", "backbones")
    """What keeps its initial weights whatever the learning rates are: gradients neither reach it
    nor, in the vision encoder, are computed at all. `backbones` trains the projector alone."""
    cache_vision_features: bool = False
    """Compute the output of a frozen vision encoder for each image once and keep it on the disk for
    all epochs, trials and evaluations with this encoder (docs/performance.md: how large)."""
    batch_size: PositiveInt = tunable(256, "choice", 64, 128, 256, 512)
    """Samples of one optimizer step, however many workers or micro-batches share it."""
    micro_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Samples of one forward pass on one worker; `auto` takes the worker's whole share, or the
    largest half, quarter, ... of it for which a GPU has the memory; on CPU, 2,048 patches."""
    epochs: PositiveInt = 5
    """Passes over the training samples, if `max_steps` does not end the training before."""
    max_steps: PositiveInt | None = None
    """Optimizer steps after which the training ends, if it has not ended with its epochs by then.
    The learning rates follow their schedule over the steps that are really taken."""
    weight_decay: NonNegativeFloat = tunable(0.01, "log_uniform", 1e-3, 0.3)
    warmup_ratio: Ratio = tunable(0.03, "uniform", 0.0, 0.2)
    """Share of the steps in which the learning rates rise linearly from 0 to their peak."""
    lr_schedule: LearningRateSchedule = tunable("cosine", "choice", "cosine", "linear", "constant")
    """How the learning rates go on after the warm-up: down to `min_lr_ratio`, or not at all."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = tunable(0.1, "uniform", 0.0, 0.5)
    """Where `cosine` and `linear` end, as a share of the peak; `constant` does not use it."""
    max_grad_norm: PositiveFloat | None = tunable(1.0, "log_uniform", 0.1, 10.0)
    """Gradients are scaled down to this global 2-norm; None does not clip."""

    data_cutoff_idx: PositiveInt | None = None
    """Use only so many rows of the shuffled training data."""
    val_ratio: Ratio = 0.01
    """Share of the training rows that is kept for the validation loss."""
    train_dataset_path: str = "HuggingFaceM4/the_cauldron"
    """Hub id, folder of parquet files, or `builtin:digits`."""
    train_dataset_name: NameList = CAULDRON_NAMES
    stream_dataset: bool = False
    """Read the training data of a hub id over the network in parts, instead of downloading it: the
    disk holds only what is prepared."""
    train_dataset_weights: Weights | None = None
    """How often an epoch has each sample of each sub-set, in the order of `train_dataset_name`: 2
    is twice, 0.5 another random half in each epoch; None has all once."""
    turns: Literal["first", "all"] = "all"
    """Which question-answer turns of a row are samples; one image serves them all. In 8k they are
    one sample together."""
    max_images_per_example: PositiveInt = 4
    """8k alone: rows with more images are left out."""
    relevance_min_rating: Rating = 1
    """Turns whose question and answer FineVision rates as less relevant are left out; 1 asks for no
    ratings."""
    image_correspondence_min_rating: Rating = 1
    """The same of how well the turn fits its image."""
    visual_dependency_min_rating: Rating = 1
    """The same of how much the answer depends on the image."""
    formatting_min_rating: Rating = 1
    """The same of the formatting."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Rows that cannot be read are left out and listed; a larger share of them is an error."""
    test_dataset_path: str = "Lin-Chen/MMStar"
    more_benchmarks: PathList = ()
    """Further benchmarks, each as `test_dataset_path`; reports have the accuracy of each as
    `NAME_accuracy`, after its folder or repository, and the mean of all as `mean_accuracy`."""
    benchmark_weights: Weights | None = None
    """In `mean_accuracy`: of `test_dataset_path`, then of `more_benchmarks`; None: all alike."""
    mmstar_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Questions answered at a time; `auto` takes 32 on CPU, and 256 on a GPU or the largest half,
    quarter, ... of it for which it has the memory."""
    mmstar_holdout: Ratio = 0.0
    """Share of the benchmark's questions that is kept apart: the same ones in every run, as many of
    each axis as its size asks for (`data/benchmark.py`)."""
    mmstar_part: BenchmarkPart = "all"
    """Which questions are asked: all, those that are kept apart, or the others (`search`)."""
    mmstar_rules: MMStarRules = "lmms-eval-0.7.2"
    """What counts as a right answer (`evaluation/mmstar_rules.py`)."""
    eval_in_epochs: bool = True
    """`run_single.py` also evaluates after each epoch, and every `eval_interval` steps."""
    eval_interval: PositiveInt | None = None

    seed: Annotated[int, Field(ge=0)] = tunable(0, "int", 0, 9)
    """Decides the initial weights, the order of the data and dropout."""
    deterministic: bool = True
    """On a GPU too, results repeat to the bit; without it sums may come in any order, which makes
    training 7 % faster on an H200. On CPU they always repeat."""
    compile: bool = True
    cpu_threads: PositiveInt = 1
    """Threads of one worker on CPU. Results on CPU repeat to the bit for an equal number."""
    resume_from_vlm_checkpoint: bool = False
    """Start from the weights in `vlm.vlm_checkpoint_path`."""
    log_wandb: bool = True
    """Follow the run with Weights & Biases, in the results folder where there is no key for it;
    changes nothing that it computes."""
    wandb_entity: str | None = None
    """User or team that the runs belong to; None for the default one."""

    vlm: VLMConfig = field(default_factory=VLMConfig)

    @property
    def min_ratings(self) -> dict[str, int]:
        """What turns must be rated at least, by kind; kinds that do not matter are left away."""
        least = {kind: getattr(self, key) for kind, key in MIN_RATING_KEYS.items()}
        return {kind: rating for kind, rating in least.items() if rating > 1}

    def __post_init__(self) -> None:
        num_names, weights = len(self.train_dataset_name), self.train_dataset_weights
        if weights is not None and len(weights) != num_names:
            raise ValueError(
                "train_dataset_weights must have a weight for each of the "
                f"{num_names} names of train_dataset_name, got {len(weights)}"
            )
        num_benchmarks = 1 + len(self.more_benchmarks)
        if self.benchmark_weights is not None and len(self.benchmark_weights) != num_benchmarks:
            raise ValueError(
                "benchmark_weights must have a weight for test_dataset_path and for each of "
                f"more_benchmarks, which makes {num_benchmarks}, got {len(self.benchmark_weights)}"
            )
        if self.mmstar_part == "holdout" and not self.mmstar_holdout:
            raise ValueError(
                "mmstar_part='holdout' asks the questions that mmstar_holdout keeps apart; "
                f"mmstar_holdout must be above 0, got {self.mmstar_holdout}"
            )

    @property
    def peak_learning_rates(self) -> dict[str, float]:
        """Of each part of the model; 0 if it is frozen, by its learning rate or by `freeze`."""
        rates = {"lr_mp": self.lr_mp}
        for key, stand_in in STAND_INS.items():
            own = getattr(self, key)
            rates[key] = getattr(self, stand_in) if own is None else own
        rates |= dict.fromkeys(FROZEN_RATES[self.freeze], 0.0)
        return {key.removeprefix("lr_"): rate for key, rate in rates.items()}
