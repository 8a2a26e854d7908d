"""A small model with random weights, in a Hugging Face folder without a tokenizer."""

from dataclasses import replace
from pathlib import Path

import torch

from distlab.model import SIZES, Llama, save


def save_random_model(folder: Path) -> Path:
    """Its weights are large, so that rounding cannot decide between two tokens."""
    shape = replace(
        SIZES["smoke"], vocab_size=97, hidden_size=48, head_dim=16, max_position_embeddings=256
    )
    torch.manual_seed(0)
    model = Llama(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(around + 0.2 * torch.randn_like(parameter))
    save(model, folder)
    return folder
