"""YAHPO Gym's LCBench surrogate: learning curves of small networks on 35 tasks of OpenML.

`model.onnx` predicts what a configuration of 7 hyperparameters reaches after each of 52 epochs
(Pfisterer et al. 2022, https://github.com/slds-lmu/yahpo_data, Apache-2.0). This file needs numpy
and onnxruntime alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

NUM_EPOCHS = 52
KEYS = (
    "batch_size", "learning_rate", "momentum", "weight_decay", "num_layers", "max_units",
    "max_dropout",
)  # fmt: skip
"""The hyperparameters, in the order in which the model takes them after the epoch."""

CHOOSE = (
    "167168", "189873", "189906", "168329", "168330", "168331", "7593", "167184", "3945",
    "126026", "167083", "167152", "167185", "167201", "168908", "189862", "189905",
)  # fmt: skip
"""Tasks by which methods and their settings are chosen."""

FINAL = (
    "34539", "126025", "126029", "146212", "167104", "167149", "167161", "167181", "167190",
    "167200", "168335", "168868", "168910", "189354", "189865", "189866", "189908", "189909",
)  # fmt: skip
"""Tasks on which what was chosen is measured once."""

_TASK = "OpenML_task_id"
_SECONDS, _ACCURACY = 0, 1
"""The columns of the output with the time of the training so far, and with the validation accuracy
in percent."""
_LEAST_SECONDS = 0.1
"""The model's times of the shortest trainings fall below 0."""


class Surrogate:
    """Validation accuracies of configurations on the benchmark's tasks, from 0 to 1."""

    def __init__(self, folder: Path) -> None:
        """Load the model on one thread.

        Args:
            folder: with `model.onnx`, `encoding.json` and `config_space.json`.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._model = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._codes: dict[str, int] = json.loads((folder / "encoding.json").read_text())[_TASK]
        content = json.loads((folder / "config_space.json").read_text())
        self.space: dict[str, dict[str, Any]] = {
            entry["name"]: entry for entry in content["hyperparameters"] if entry["name"] in KEYS
        }
        """Kind, range, scale and default of each hyperparameter, as the benchmark states them."""

    def curve(self, task: str, values: Mapping[str, Any]) -> np.ndarray:
        """Return the accuracy of a configuration after each epoch, float[NUM_EPOCHS]."""
        row = [float(values[key]) for key in KEYS]
        epochs = np.arange(1, NUM_EPOCHS + 1)
        return self.accuracies(task, np.array([row] * NUM_EPOCHS), epochs)

    def accuracies(
        self, task: str, configurations: np.ndarray, epochs: int | Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Return float[n] for float[n, KEYS] after so many epochs, one number or int[n]."""
        outputs = self._predict(task, configurations, epochs)
        return np.clip(outputs[:, _ACCURACY].astype(float) / 100, 0, 1)

    def seconds(
        self, task: str, configurations: np.ndarray, epochs: int | Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Return how long the trainings took so far, float[n]; see `accuracies`."""
        outputs = self._predict(task, configurations, epochs)
        return np.maximum(outputs[:, _SECONDS].astype(float), _LEAST_SECONDS)

    def _predict(
        self, task: str, configurations: np.ndarray, epochs: int | Sequence[int] | np.ndarray
    ) -> np.ndarray:
        inputs = np.empty((len(configurations), 1 + len(KEYS)), np.float32)
        inputs[:, 0] = epochs
        inputs[:, 1:] = configurations
        tasks = np.full((len(inputs), 1), self._codes[task], np.int32)
        (outputs,) = self._model.run(None, {"x_cat": tasks, "x_cont": inputs})
        predicted: np.ndarray = outputs
        return predicted
