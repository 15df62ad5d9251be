"""Read a checkpoint folder, dense or pruned, without running any code that lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nirvana_deploy.artifact import read_json
from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.model import modeling_nirvana
from nirvana_deploy.model.shape import shape_from_config
from nirvana_deploy.model.weights import SafetensorsWeights, check_weights

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""What travels with the weights from folder to folder, where it exists."""


def config_json(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json``; raises NirvanaError when it is missing or damaged."""
    config: dict[str, Any] = read_json(folder / "config.json")
    return config


def read_config(folder: Path) -> PreTrainedConfig:
    """The config object of a checkpoint; a pruned one gets the class of this package, not of the folder."""
    config = config_json(folder)
    shape = shape_from_config(config)
    if "per_layer_config" not in config:
        return AutoConfig.for_model(**config)
    config_class = getattr(modeling_nirvana, f"Nirvana{shape.family.name.capitalize()}Config")
    return config_class.from_dict(config)


def load_checkpoint(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A runnable transformers model in eval mode from a dense or pruned checkpoint folder.

    No flag is needed and no code of the folder runs: differing layers are built by this package.
    Raises NirvanaError when tensors are missing or do not have the shapes that config.json asks for.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise NirvanaError(f"{folder} is not a checkpoint: it has no config.json.")
    config = read_config(folder)
    shape = shape_from_config(config_json(folder))
    check_weights(SafetensorsWeights(folder), shape)
    if config.is_heterogeneous:
        model_class = getattr(modeling_nirvana, f"Nirvana{shape.family.name.capitalize()}ForCausalLM")
    else:
        model_class = AutoModelForCausalLM
    model: PreTrainedModel = model_class.from_pretrained(folder, config=config, dtype=dtype)
    return model.eval()
