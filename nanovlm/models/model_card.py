"""The text that introduces a model on the hub: its `README.md`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from huggingface_hub import ModelCardData

from nanovlm.config import TrainConfig, VLMConfig

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
    start = _start(config, training)
    sections = [_about(repo_id, config, num_parameters, start), _use(repo_id)]
    if training is not None:
        sections.append(_training(training))
        if score is not None:
            sections.append(_evaluation(training, score))
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _start(config: VLMConfig, training: TrainConfig | None) -> str:
    if training is not None and training.resume_from_vlm_checkpoint:
        return f"starts from `{config.vlm_checkpoint_path}`"
    if config.vlm_load_backbone_weights:
        return f"starts from `{config.vit_model_type}` and `{config.lm_model_type}`"
    return "starts from random weights"


def _about(repo_id: str, config: VLMConfig, num_parameters: int, start: str) -> str:
    return f"""# {repo_id.split("/")[-1]}

A vision-language model of the nanoVLM family: a SigLIP vision encoder, a pixel-shuffle projector
and a Llama decoder answer a question about one image. Training {start}.

| | |
|---|---|
| parameters | {num_parameters:,} |
| vision encoder | {config.vit_n_blocks} blocks, width {config.vit_hidden_dim}, \
{config.vit_n_heads} heads; {config.vit_img_size} x {config.vit_img_size} pixels in patches of \
{config.vit_patch_size} x {config.vit_patch_size} |
| projector | pixel shuffle {config.mp_pixel_shuffle_factor}: {config.num_image_tokens} tokens an \
image |
| decoder | {config.lm_n_blocks} blocks, width {config.lm_hidden_dim}, {config.lm_n_heads} query \
heads on {config.lm_n_kv_heads} key-value heads, {config.lm_vocab_size:,} tokens |
| tokenizer | `{config.lm_tokenizer}` |"""


def _use(repo_id: str) -> str:
    return f"""## Use

    python -m nanovlm generate --checkpoint {repo_id} --image photo.jpg --prompt "What is this?"

```python
from nanovlm.models.vision_language_model import VisionLanguageModel

model = VisionLanguageModel.from_pretrained("{repo_id}")
```"""


def _training(training: TrainConfig) -> str:
    values = {k: v for k, v in asdict(training).items() if k not in _NOT_HYPERPARAMETERS}
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
