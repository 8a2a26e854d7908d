"""Which keys DeepSpeed knows: asked of DeepSpeed's own reading of a config, in place of a list.

Most of its sections are pydantic models that refuse an extra key; of the others, and of the top
level, it asks for the keys that it knows, and a key that nobody asks for is ignored in silence.
"""

import copy
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zero import engine

TOTAL, MICRO, ACCUMULATE = BATCH = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
)  # fmt: skip
ASKED_LATER = {"sequence_parallel_size"}  # once the ranks have met
FREE = "params"  # of an optimizer or scheduler, which takes them


class Asked(dict):  # type: ignore[type-arg]
    """A section of a config that knows which of its keys somebody has asked for."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__({k: Asked(v) if isinstance(v, Mapping) else v for k, v in content.items()})
        self.names: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.names.add(key)
        return super().__contains__(key)

    def keys(self) -> Any:  # so that `key in section.keys()` asks too
        return self

    def __iter__(self) -> Iterator[Any]:  # and `**section` asks for each
        return super().__iter__()


@dataclass(frozen=True)
class Answer:
    """Unknown keys, by path, with the keys that are known beside them; the first other refusal."""

    unknown: dict[str, set[str]]
    refusal: str = ""


def ask_deepspeed(given: Mapping[str, Any]) -> Answer:
    """What DeepSpeed's own reading of the config asks for and refuses: its keys need no list here.

    Its sections are pydantic models, which refuse an extra key, or are asked key by key.
    """
    engine.load()
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    config: Any = {**copy.deepcopy(dict(given)), TOTAL: None, MICRO: 1, ACCUMULATE: 1}
    unknown: dict[str, set[str]] = {}
    refusal = ""
    while True:
        asked = Asked(config)
        try:
            DeepSpeedConfig(asked)
        except ValidationError as error:
            one = error.errors()[0]
            path = [str(part) for part in one["loc"]]
            home = _home(config, path, one["input"])
            if one["type"] == "extra_forbidden" and home is not None:
                unknown[".".join([*home, *path])] = _fields(error.title, path[:-1])
                _drop(config, [*home, *path])
                continue
            refusal = f"{'.'.join([*(home or []), *path])} {one['input']!r}: {one['msg']}"
        except Exception as error:  # asserts, and what "auto" or a section that is none leads to
            refusal = (str(error).splitlines() or [type(error).__name__])[0]
        break
    DeepSpeedConfig(nothing := Asked({MICRO: 1}))
    top = nothing.names | ASKED_LATER
    unknown.update((name, top) for name in config if name not in top)
    if not refusal:
        unknown.update(_unasked(asked))
    return Answer(unknown, refusal)


def _unasked(section: Asked, path: str = "") -> Iterator[tuple[str, set[str]]]:
    """Keys in sections that nobody asked for, where others of the section were."""
    for name, value in section.items():
        if isinstance(value, Asked) and name != FREE:
            for key in value if value.names else ():
                if key not in value.names:
                    yield f"{path}{name}.{key}", value.names
            yield from _unasked(value, f"{path}{name}.")


def _home(config: Mapping[str, Any], path: list[str], value: Any) -> list[str] | None:
    """Where in the config the section is in which `path` leads to `value`."""
    found: Any = config
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is not None and found == value:
        return []
    for name, inner in config.items():
        if isinstance(inner, Mapping) and (deeper := _home(inner, path, value)) is not None:
            return [name, *deeper]
    return None


def _drop(config: dict[str, Any], path: list[str]) -> None:
    for name in path[:-1]:
        config = config[name]
    del config[path[-1]]


def _fields(title: str, path: list[str]) -> set[str]:
    """The keys of a pydantic model of DeepSpeed's, or of one that `path` leads to in it."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    model = next((one for one in _below(DeepSpeedConfigModel) if one.__name__ == title), None)
    for name in path:
        fields = getattr(model, "model_fields", {})
        kind = fields[name].annotation if name in fields else None
        kinds = [kind, *typing.get_args(kind)]
        model = next((one for one in kinds if hasattr(one, "model_fields")), None)
    fields = getattr(model, "model_fields", {})
    return {field.alias or name for name, field in fields.items()}


def _below(kind: Any) -> Iterator[Any]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)
