"""A paged inference engine: continuous batching over a paged KV cache, with an OpenAI server."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paged_engine.config import EngineConfig
    from paged_engine.engine import Engine, EngineStats, Output
    from paged_engine.llm import LLM, CompletionOutput, RequestOutput
    from paged_engine.sampler import SampledToken
    from paged_engine.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Output",
    "RequestOutput",
    "SampledToken",
    "SamplingParams",
]
_MODULES = {
    "sampling_params": ("SamplingParams",),
    "sampler": ("SampledToken",),
    "config": ("EngineConfig",),
    "engine": ("Engine", "EngineStats", "Output"),
    "llm": ("LLM", "CompletionOutput", "RequestOutput"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch alone takes a second."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"paged_engine.{_MODULE_OF[name]}"), name)
