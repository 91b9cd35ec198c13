"""A model to the hub, with its card."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from torch import nn

from nanovlm.config import TrainConfig, VLMConfig
from nanovlm.errors import UserError
from nanovlm.models.checkpoint import write_model
from nanovlm.models.model_card import Score, model_card
from nanovlm.models.model_files import first_reason, forget_downloads, is_hub_id

CARD_FILE = "README.md"


def push_model(
    config: VLMConfig,
    model: nn.Module,
    repo_id: str,
    *,
    private: bool,
    token: str | None,
    training: TrainConfig | None,
    score: Score | None,
) -> str:
    """Make the repository if it is not there, commit model and card; return the commit's address.

    Raises:
        UserError: the hub does not take it.
    """
    try:
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        card = model_card(
            repo_id,
            config,
            sum(parameter.numel() for parameter in model.parameters()),
            base_models=_base_models(config, training),
            datasets=_datasets(training),
            training=training,
            score=score,
        )
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), config, model)
            Path(folder, CARD_FILE).write_text(card, encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload model"
            )
    except (OSError, HTTPError, ValueError) as error:
        raise UserError(
            f"push_to_hub: {repo_id!r} was not written: {first_reason(error)}. The hub wants a "
            "name such as USER/NAME and a token that may write there: `hf auth login`, or HF_TOKEN"
        ) from error
    forget_downloads()
    return commit.commit_url


def _datasets(training: TrainConfig | None) -> list[str]:
    if training is None:
        return []
    name, _, _revision = training.train_dataset_path.partition("@")
    return [name] if is_hub_id(name) else []


def _base_models(config: VLMConfig, training: TrainConfig | None) -> list[str]:
    if training is not None and training.resume_from_vlm_checkpoint:
        names = [config.vlm_checkpoint_path]
    elif config.vlm_load_backbone_weights:
        names = [config.vit_model_type, config.lm_model_type]
    else:
        names = []
    return [name for name in names if is_hub_id(name)]
