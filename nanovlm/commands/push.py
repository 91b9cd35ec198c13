"""Put a saved model on the hub, with a card that tells how it was trained if that is known."""

import argparse
import sys
from pathlib import Path

from nanovlm import cli
from nanovlm.config.schema import TrainConfig
from nanovlm.config.sources import Layer, build_config
from nanovlm.hub import Score, push_to_hub
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.results.read import (
    ANSWERS_DIR,
    BEST_MODEL_DIR,
    CHECKPOINTS_DIR,
    LOGS_DIR,
    SUMMARY_FILE,
    TENSORBOARD_DIR,
    TRIALS_FILE,
    FolderReader,
)
from nanovlm.results.remote import is_uri, local_copy
from nanovlm.results.statistics import NUM_ITEMS, wilson_interval
from nanovlm.results.summary import read_best

EXAMPLES = """examples:
  python -m nanovlm push --checkpoint results/digits/best --repo USER/NAME
  python -m nanovlm push --checkpoint results/digits/best --repo USER/NAME --private

It asks for no token: `hf auth login` stores one, or HF_TOKEN holds it.
"""


_NOT_PUSHED = (ANSWERS_DIR, CHECKPOINTS_DIR, LOGS_DIR, TENSORBOARD_DIR)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FOLDER",
        help="a saved model; best/ of a results folder, which may be in a bucket",
    )
    parser.add_argument(
        "--repo", required=True, metavar="USER/NAME", help="made if it is not there"
    )
    parser.add_argument("--private", action="store_true", help="only its owner sees a new one")


def run(arguments: argparse.Namespace) -> int:
    checkpoint = fetch(arguments.checkpoint)
    training, score = read_summary(checkpoint)
    model = VisionLanguageModel.from_pretrained(checkpoint)
    address = push_to_hub(
        model, arguments.repo, private=arguments.private, training=training, score=score
    )
    sys.stdout.write(f"{address}\n")
    return cli.DONE


def fetch(place: str) -> Path:
    """Return the folder of a saved model. Of one in a bucket it is a copy, beside what its results
    folder says of it if it is the best one there.

    Raises:
        UserError: there is nothing, or the bucket cannot be reached.
    """
    path, mark, query = place.partition("?")
    parent, _, name = path.rstrip("/").rpartition("/")
    if not is_uri(place) or name != BEST_MODEL_DIR:
        return local_copy("--checkpoint", place)
    return local_copy("--checkpoint", f"{parent}{mark}{query}", without=_NOT_PUSHED) / name


def read_summary(checkpoint: Path) -> tuple[TrainConfig | None, Score | None]:
    """Return how the model in `best/` was trained and what it reached, by its results folder.

    Nothing is known of a model that lies elsewhere.
    """
    folder = checkpoint.resolve().parent
    reader = FolderReader(folder)
    if checkpoint.resolve().name != BEST_MODEL_DIR or not reader.has(TRIALS_FILE, SUMMARY_FILE):
        return None, None
    best = read_best(reader)
    reader.raise_if_damaged()
    if best is None:
        return None, None
    accuracy, num_items = best.metrics["mmstar_accuracy"], int(best.metrics[NUM_ITEMS])
    # Not the summary's interval, which is that of the objective, perhaps another metric.
    interval = wilson_interval(accuracy, num_items)
    score = Score(accuracy=accuracy, interval_95=interval, num_items=num_items)
    return build_config(Layer(f"{folder}: {best.trial_id}", best.config)), score
