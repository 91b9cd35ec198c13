"""What Ray Tune runs in tests of its private parts."""

from typing import Any

from ray import tune


class ValueTrainable(tune.Trainable):
    """Has the value that it is given, also when Tune reuses it."""

    def setup(self, config: dict[str, Any]) -> None:
        self.value = config["value"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.setup(new_config)
        return True
