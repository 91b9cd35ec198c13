"""Training in bfloat16 follows training in float32."""

import dataclasses

import pytest
from torch import nn

from nanovlm.config import TrainConfig
from nanovlm.models.vision_language_model import VisionLanguageModel
from nanovlm.training.loop import train
from tests.devices import on_each_device, use_bfloat16
from tests.tiny import vlm_config
