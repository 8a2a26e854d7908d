"""What an engine loads of a model directory: tokenizer, chat template, and the model runner."""

from collections.abc import Sequence as List
from pathlib import Path
from typing import Any

from distlab.errors import RunError, UsageError
from paged_engine._engine_types import EngineConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_tokenizer(directory: str | Path) -> Any:
    """Transformers' tokenizer of a model directory; None if it has no tokenizer.

    Raises:
        RunError: its files are damaged.
    """
    folder = Path(directory)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # a second or two, and not needed for token ids

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"the tokenizer in {folder} cannot be read: {reason}") from error


def chat_ids(tokenizer: Any, messages: List[dict[str, Any]], model: object) -> list[int]:
    """The token ids of a conversation by the model's own template, up to the answer's beginning."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(f"{model} has no chat template; use generate with a prompt instead")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, KeyError) as error:
        raise UsageError(f"the chat template refuses these messages: {error}") from error
    return tokenizer.encode(text, add_special_tokens=False)  # the template has written them


def load_runner(config: EngineConfig) -> Any:
    """The `paged_engine.runner.ModelRunner` of these settings."""
    from paged_engine.runner import ModelRunner  # brings the model's code, which is slow to import

    return ModelRunner(
        config.model,
        dtype=config.dtype,
        device=config.device,
        num_blocks=config.num_blocks,
        kv_cache_bytes=config.kv_cache_bytes,
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
        max_model_len=config.max_model_len,
        tensor_parallel=config.tensor_parallel,
        compile=config.compile,
    )
