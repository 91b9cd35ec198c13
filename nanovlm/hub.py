"""A model on the Hugging Face Hub: its card, and how both get there."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData

from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.downloads import (
    HUB_ERRORS,
    first_reason,
    forget_downloads,
    is_hub_id,
    split_revision,
)
from nanovlm.errors import UserError
from nanovlm.models.checkpoint import write_model
from nanovlm.models.vision_language_model import VisionLanguageModel

_NOT_HYPERPARAMETERS = {"vlm", "train_dataset_name", "log_wandb", "wandb_entity"}


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model reached on the benchmark."""

    accuracy: float
    interval_95: tuple[float, float]
    num_items: int


def model_card(
    repo_id: str,
    config: VLMConfig,
    num_parameters: int,
    *,
    base_models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    training: TrainConfig | None = None,
    score: Score | None = None,
) -> str:
    """Return the card: metadata as YAML between `---` lines, then Markdown.

    Args:
        base_models: the hub's models that training started from.
        datasets: the hub's data sets that it was trained on.
        training: how it was trained, if that is known.
        score: what it then reached on `training.test_dataset_path`.
    """
    metadata = ModelCardData(
        library_name="nanovlm",
        pipeline_tag="image-text-to-text",
        tags=["nanovlm", "vision-language-model"],
        base_model=list(base_models) or None,
        datasets=list(datasets) or None,
    )
    names = [f"`{name}`" for name in _starts_from(config, training)]
    start = " and ".join(names) or "random weights"
    sections = [_about(repo_id, config, num_parameters, start), _use(repo_id)]
    if training is not None:
        sections.append(_training(training))
        if score is not None:
            sections.append(_evaluation(training, score))
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _starts_from(config: VLMConfig, training: TrainConfig | None) -> list[str]:
    """Return the folders or hub ids of the models that training started from."""
    if training is not None and training.resume_from_vlm_checkpoint:
        return [config.vlm_checkpoint_path]
    if config.vlm_load_backbone_weights:
        return [config.vit_model_type, config.lm_model_type]
    return []


def _about(repo_id: str, config: VLMConfig, num_parameters: int, start: str) -> str:
    tiled = config.traits.is_tiled
    what = "questions about images, one after the other" if tiled else "a question about one image"
    size = f"{config.vit_img_size} x {config.vit_img_size}"
    largest = f"{config.max_img_size} x {config.max_img_size}"
    images = f"images up to {largest} in tiles of {size}" if tiled else size
    return f"""# {repo_id.split("/")[-1]}

A vision-language model of the nanoVLM family: a SigLIP vision encoder, a pixel-shuffle projector
and a Llama decoder answer {what}. Training starts from {start}.

| | |
|---|---|
| parameters | {num_parameters:,} |
| generation | nanoVLM {config.generation} |
| vision encoder | {config.vit_n_blocks} blocks, width {config.vit_hidden_dim}, \
{config.vit_n_heads} heads; {images} pixels in patches of \
{config.vit_patch_size} x {config.vit_patch_size} |
| projector | pixel shuffle {config.mp_pixel_shuffle_factor}: {config.num_image_tokens} tokens \
{"a tile" if tiled else "an image"} |
| decoder | {config.lm_n_blocks} blocks, width {config.lm_hidden_dim}, {config.lm_n_heads} query \
heads on {config.lm_n_kv_heads} key-value heads, {config.lm_vocab_size:,} tokens{_extra(config)} |
| tokenizer | `{config.lm_tokenizer}` |"""


def _extra(config: VLMConfig) -> str:
    first, *others = [f"`{token}`" for token in config.vlm_extra_tokens.values()] or [""]
    more = f" and {len(others)} more extra tokens" if others else ""
    return f", {first}{more} included" if first else ""


def _use(repo_id: str) -> str:
    return f"""## Use

    python -m nanovlm generate --checkpoint {repo_id} --image photo.jpg --prompt "What is this?"

```python
from nanovlm.models.vision_language_model import VisionLanguageModel

model = VisionLanguageModel.from_pretrained("{repo_id}")
```"""


def _training(training: TrainConfig) -> str:
    left_out = _NOT_HYPERPARAMETERS
    if not training.vlm.traits.is_tiled:
        left_out = left_out | {"max_images_per_example"}
    values = {k: v for k, v in asdict(training).items() if k not in left_out}
    rows = "\n".join(f"| `{key}` | `{value}` |" for key, value in values.items())
    names = ", ".join(training.train_dataset_name)
    return f"""## Training

| | |
|---|---|
{rows}

Sub-sets of the training data: {names}."""


def _evaluation(training: TrainConfig, score: Score) -> str:
    low, high = score.interval_95
    dataset = training.test_dataset_path
    return f"""## Evaluation

`mmstar_accuracy` on `{dataset}`: **{score.accuracy:.3f}**, 95 % interval {low:.3f} to {high:.3f}
({score.num_items:,} questions). Answers are decoded greedily, end at the first EOS, and are right
by the rules of `{training.mmstar_rules}`."""


CARD_FILE = "README.md"


def push_to_hub(
    model: VisionLanguageModel,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    training: TrainConfig | None = None,
    score: Score | None = None,
) -> str:
    """Commit a model and a card that describes it; return the commit's address.

    Args:
        repo_id: `USER/NAME`; the repository is made if it is not there.
        private: of a new repository: only its owner sees it.
        token: None takes the one of `hf auth login` or of HF_TOKEN.
        training, score: for the card: how the model was trained, and what it then reached.

    Raises:
        UserError: the hub does not take it.
    """
    datasets = [] if training is None else [split_revision(training.train_dataset_path)[0]]
    try:
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = model_card(
            repo_id,
            model.config,
            sum(parameter.numel() for parameter in model.parameters()),
            base_models=[*filter(is_hub_id, _starts_from(model.config, training))],
            datasets=[*filter(is_hub_id, datasets)],
            training=training,
            score=score,
        )
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), model.config, model)
            Path(folder, CARD_FILE).write_text(card, encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload model"
            )
    except HUB_ERRORS as error:
        raise UserError(
            f"push_to_hub: {repo_id!r} was not written: {first_reason(error)}. The hub wants a "
            "name such as USER/NAME and a token that may write there: `hf auth login`, or HF_TOKEN"
        ) from error
    forget_downloads()
    return commit.commit_url
