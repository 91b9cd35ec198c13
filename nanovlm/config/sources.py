"""From files and `key=value` arguments to a `TrainConfig`, and back.

One precedence: defaults < numbers of the model to start from < preset < file < command line. Every
value keeps its source, so that an error can name it. All errors are reported together.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nanovlm.config.generations import DERIVED_KEYS
from nanovlm.config.schema import TrainConfig, VLMConfig
from nanovlm.config.yaml_text import parse_yaml, read_mapping
from nanovlm.errors import UserError, did_you_mean, plain_rule
from nanovlm.files import user_path

PRESETS_DIR = Path(__file__).resolve().parent / "presets"
SPACES_DIR = PRESETS_DIR.parents[2] / "search_spaces"
"""In the repository, and beside the packages where it is installed."""

TRAIN_KEYS = tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name != "vlm")
VLM_KEYS = tuple(f"vlm.{f.name}" for f in dataclasses.fields(VLMConfig))
CONFIG_KEYS = TRAIN_KEYS + VLM_KEYS
"""Every key of a configuration; those of `VLMConfig` carry the prefix `vlm.`."""
_DERIVED = {f"vlm.{name}": rule for name, rule in DERIVED_KEYS.items()}
"""Keys that may be given although their values follow from others; and the rule."""


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Return the values of `key=value` arguments; a value is read as YAML (`1e-3`, `[a, b]`)."""
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise UserError(f"command line: {argument!r} is not of the form key=value")
        values[key] = parse_yaml(text, f"command line: {key}")
    return values


@dataclasses.dataclass(frozen=True)
class Layer:
    """Values of one source."""

    source: str
    """A file, a preset or the command line, for messages."""
    values: Mapping[str, Any]


LayersBelow = Callable[[Sequence[Layer]], Sequence[Layer]]
"""Returns layers between the defaults and the given ones: the numbers of the model to start from.

They are on disk or on the hub, where nanovlm/training/start.py reads them."""


def preset_layer(preset: str) -> Layer:
    """Return the values of a preset: a name in `presets/` or the path of a YAML file."""
    path = user_path(preset)
    if path.suffix not in (".yaml", ".yml"):
        names = sorted(p.stem for p in PRESETS_DIR.glob("*.yaml"))
        if preset not in names:
            raise UserError(f"preset: there is no {preset!r}.{did_you_mean(preset, names)}")
        path = PRESETS_DIR / f"{preset}.yaml"
    return Layer(str(path), read_mapping(path))


def build_config(*layers: Layer, below: LayersBelow = lambda layers: ()) -> TrainConfig:
    """Return the configuration of the layers over the defaults; later layers win.

    Raises:
        UserError: with a message for every unknown key and every value that does not fit.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    messages: list[str] = []
    for layer in (*below(layers), *layers):
        flat, bad = _flatten(layer)
        messages += bad
        for key, value in flat.items():
            if key in CONFIG_KEYS or key in _DERIVED:
                values[key], sources[key] = value, layer.source
            else:
                messages.append(f"{layer.source}: unknown key {key!r}.{_nearest_key(key)}")
    vlm_values = {k.removeprefix("vlm."): v for k, v in values.items() if k in VLM_KEYS}
    train_values = {k: v for k, v in values.items() if k in TRAIN_KEYS}
    vlm = VLMConfig()
    try:
        vlm = VLMConfig(**vlm_values)
        messages += _contradictions(vlm, values, sources)
    except ValidationError as error:
        messages += [_describe(details, "vlm.", sources) for details in error.errors()]
    try:
        config = TrainConfig(**train_values, vlm=vlm)
    except ValidationError as error:
        messages += [_describe(details, "", sources) for details in error.errors()]
    if messages:
        raise UserError(*messages)
    return config


def given_values(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the values of the layers by key, unchecked; later layers win."""
    return {key: value for layer in layers for key, value in _flatten(layer)[0].items()}


def _contradictions(
    vlm: VLMConfig, values: Mapping[str, Any], sources: Mapping[str, str]
) -> list[str]:
    """Return a message for every given value that is not what follows from the others."""
    messages = []
    for key, rule in _DERIVED.items():
        expected = getattr(vlm, key.removeprefix("vlm."))
        if key in values and values[key] != expected:
            messages.append(
                f"{sources[key]}: {key}: must be {expected!r}, {rule}, got {values[key]!r}"
            )
    return messages


def _nearest_key(key: str) -> str:
    """Return ` Did you mean ...?` for an unknown key; `vlm.` may have been forgotten."""
    full_names = {name.removeprefix("vlm."): name for name in CONFIG_KEYS}
    near = difflib.get_close_matches(key.removeprefix("vlm."), full_names, n=1)
    return f" Did you mean {full_names[near[0]]!r}?" if near else " See docs/config.md."


def load_config(
    file: Path | None,
    preset: str | None,
    overrides: Mapping[str, Any],
    below: LayersBelow = lambda layers: (),
) -> TrainConfig:
    """Return the configuration of a single run. A file may name its own `preset`."""
    values = read_mapping(file) if file else {}
    file_preset = values.pop("preset", None)
    overrides = dict(overrides)
    preset = overrides.pop("preset", None) or preset or file_preset
    layers = [preset_layer(str(preset))] if preset else []
    layers += [Layer(str(file), values), Layer("command line", overrides)]
    return build_config(*layers, below=below)


def config_values(config: TrainConfig) -> dict[str, Any]:
    """Return all keys and values as plain YAML types; `build_config` takes them back."""
    return dataclasses.asdict(config, dict_factory=_with_lists)


def flat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings as one, with keys as on the command line: `vlm.lm_dropout`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": below for inner, below in flat_values(value).items()}
        else:
            flat[key] = value
    return flat


def earlier_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat what `config_values` returned in an earlier version: what it did not know yet is
    as by default."""
    return {**flat_values(config_values(TrainConfig())), **flat_values(values)}


def get_value(config: TrainConfig, key: str) -> Any:
    owner = config.vlm if key.startswith("vlm.") else config
    return getattr(owner, key.removeprefix("vlm."))


def _flatten(layer: Layer) -> tuple[dict[str, Any], list[str]]:
    """Return `layer` with `vlm: {x: 1}` written as `vlm.x: 1`, and messages of errors in it."""
    flat = {key: value for key, value in layer.values.items() if key != "vlm"}
    vlm = layer.values.get("vlm") or {}
    if not isinstance(vlm, Mapping):
        return flat, [f"{layer.source}: vlm: must be a mapping, got {vlm!r}"]
    nested = {f"vlm.{key}": value for key, value in vlm.items()}
    twice = [f"{layer.source}: key stands twice: {key}" for key in sorted(flat.keys() & nested)]
    return flat | nested, twice


def _describe(details: ErrorDetails, prefix: str, sources: Mapping[str, str]) -> str:
    rule = plain_rule(details["msg"])
    if not details["loc"]:  # a rule between several keys; its text names them
        vlm_sources = sorted({source for key, source in sources.items() if key.startswith(prefix)})
        return f"{' + '.join(vlm_sources) or 'defaults'}: {rule}"
    key = prefix + str(details["loc"][0])
    return f"{sources.get(key, 'defaults')}: {key}: {rule}, got {details['input']!r}"


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}
