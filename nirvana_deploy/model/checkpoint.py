"""A checkpoint folder, dense or pruned, opened once and passed on; no code that lies in it runs.

Library functions take ``checkpoint: Checkpoint``. Only the door (``cli/``, ``pipeline.py``, ``*/stage.py``,
:func:`load_checkpoint`) turns a path into one, so config.json is parsed and weights are checked once.
"""

from __future__ import annotations

import copy
import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.config import PRUNED_KEYS, context_tokens, reason_of
from nirvana_deploy.model.families import FAMILIES, shape_from_config
from nirvana_deploy.model.family import Computation, Family
from nirvana_deploy.model.rope import rotary_frequencies
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.sources import ModelFolder
from nirvana_deploy.model.text.source_card import legal_files, source_card
from nirvana_deploy.model.text.stops import require_settings, stop_ids
from nirvana_deploy.model.text.tokenizer import TOKENIZER_FILES as FILES
from nirvana_deploy.model.text.tokenizer import tokenizer_in
from nirvana_deploy.model.weight_files import require_no_other_file, require_weight_files
from nirvana_deploy.model.weights import (
    OffsetNorms,
    SafetensorsWeights,
    SplitWeights,
    WeightSource,
    check_weights,
    with_own_head,
)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what travels with the weights from folder to folder: tokenizer, generation config, legal files."""
    for name in (*FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for file in legal_files(source):
        shutil.copyfile(file, folder / file.name)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder whose config and tensors agree.

    Opening reads config.json and the headers of the safetensors files; tensors are read on demand.
    """

    path: Path
    config: dict[str, Any]
    """The parsed config.json, untied where the stored head is another; callers must not modify it."""
    shape: ModelShape
    weights: WeightSource
    """Fused linears apart."""

    def __repr__(self) -> str:
        parameters = self.shape.linear_parameters + self.shape.embedding_parameters
        return (
            f"Checkpoint({str(self.path)!r}, {self.shape.family.name}, {len(self.shape.layers)} layers, "
            f"{parameters:,} parameters)"
        )

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open the folder ``path``.

        Raises NirvanaError for a folder without config.json or safetensors, an unsupported model, and tensors
        that are missing, of no use, or do not have the shapes that config.json asks for.
        """
        if not (path / "config.json").is_file():
            raise NirvanaError(f"{path} is not a checkpoint: it has no config.json.")
        config = config_json(path)
        require_settings(path)
        said = shape_from_config(config)
        require_weight_files(path)
        require_no_other_file(path, config)
        weights: WeightSource = SafetensorsWeights(path)
        shape = with_own_head(said, weights)
        if any(site.fused for site in shape.family.sites):
            weights = SplitWeights(weights, shape)
        if shape != said and not shape.family.encoder_decoder:  # whose flag says more than that
            config = {**config, "tie_word_embeddings": False}
        check_weights(weights, shape)
        checkpoint = cls(path=path, config=config, shape=shape, weights=weights)
        if not shape.family.encoder_decoder:
            for kind in checkpoint.computation.rotary_kinds:
                checkpoint.rotary_frequencies(kind)
        return checkpoint

    @cached_property
    def pretrained_config(self) -> PreTrainedConfig:
        """The config object of transformers; that of a pruned model gets the class of this package."""
        return _pretrained_config(self.config, self.shape.family)

    @cached_property
    def computation(self) -> Computation:
        """What a decoder computes between its weights; not of an encoder-decoder."""
        family = self.shape.family
        assert family.computation is not None, family.name
        return family.computation(self.pretrained_config)

    def rotary_frequencies(self, kind: str) -> tuple[torch.Tensor, float]:
        """(inverse frequencies, factor on cosine and sine) of one of the rotary embeddings of a decoder."""
        share = self.computation.rotary_share
        return rotary_frequencies(
            self.pretrained_config, head_dim=self.shape.head_dim, kind=kind, share=share
        )

    @cached_property
    def multiplied_weights(self) -> WeightSource:
        """The weights as they are multiplied with: those of norms with what the family adds to them."""
        if self.shape.family.computation is None or self.computation.norm_offset == 0:
            return self.weights
        return OffsetNorms(self.weights, self.shape, self.computation.norm_offset)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; raises NirvanaError when there is none."""
        return load_tokenizer(self.path)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The ids that end a generation."""
        return frozenset(stop_ids(self.path))

    @property
    def context_tokens(self) -> int | None:
        """The most tokens that the model can place; None where it has no end."""
        return context_tokens(self.pretrained_config)

    def require_length(self, seq_len: int, *, option: str = "--seq-len") -> None:
        """Raise NirvanaError when the ``seq_len`` tokens of ``option`` are more than the model can place."""
        if self.context_tokens is not None and seq_len > self.context_tokens:
            raise NirvanaError(
                f"seq_len {seq_len} is longer than the model's {self.context_tokens} positions.",
                hint=f"Pass {option} {self.context_tokens} or less.",
            )

    def load(self, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """A runnable transformers model in eval mode, with all weights in memory."""
        _require_generation_config(self.path)
        config = _pretrained_config(self.config, self.shape.family)  # the model changes and keeps it
        with _quiet_loading():
            model: PreTrainedModel = model_class(config, self.shape.family).from_pretrained(
                self.path, config=config, dtype=dtype, use_safetensors=True
            )
        return model.eval()

    def meta_model(self) -> PreTrainedModel:
        """The modules of the model without any weights: parameters live on torch's meta device."""
        return meta_model(_pretrained_config(self.config, self.shape.family))


def load_checkpoint(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A runnable transformers model in eval mode from a dense or pruned checkpoint folder.

    No flag is needed and no code of the folder runs: differing layers are built by this package.
    Raises NirvanaError when tensors are missing or do not have the shapes that config.json asks for.
    """
    return Checkpoint.open(Path(folder)).load(dtype=dtype)


def norm_offset(config: PreTrainedConfig) -> float:
    """What the family of a config adds to the weight of a norm."""
    computation = FAMILIES[config.model_type].computation
    return 0.0 if computation is None else computation(config).norm_offset


def config_json(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json``; raises NirvanaError when it is missing or damaged."""
    config: dict[str, Any] = read_json(folder / "config.json")
    return config


def read_config(folder: Path) -> PreTrainedConfig:
    """The config object of a folder with a ``config.json``."""
    config = config_json(folder)
    return _pretrained_config(config, shape_from_config(config).family)


def _pretrained_config(config: dict[str, Any], family: Family) -> PreTrainedConfig:
    """A pruned model gets the config class of this package, not of its folder."""
    config = copy.deepcopy(config)  # transformers completes nested dictionaries in place
    if not any(key in config for key in PRUNED_KEYS):
        return AutoConfig.for_model(**config)
    config_class = getattr(_modeling(), family.own_config_class)
    return config_class.from_dict(config)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or ONNX folder; raises NirvanaError when there is none."""
    if not (folder / "tokenizer_config.json").is_file():
        raise NirvanaError(f"{folder} has no tokenizer (tokenizer_config.json, tokenizer.json).")
    known = {"config": read_config(folder)} if (folder / "config.json").is_file() else {}  # an ONNX folder
    tokenizer: PreTrainedTokenizerBase = tokenizer_in(folder, **known)
    return tokenizer


def model_class(config: PreTrainedConfig, family: Family) -> type[PreTrainedModel]:
    """The class that computes a checkpoint: transformers' own, or ours when its layers differ."""
    if config.is_heterogeneous or hasattr(config, "pruned_layers"):
        return getattr(_modeling(), family.own_architecture)  # type: ignore[no-any-return]
    return getattr(transformers, family.architecture)  # type: ignore[no-any-return]


def _modeling() -> ModuleType:
    """The module of models whose layers differ; imported when one is met, for it brings others along."""
    return importlib.import_module("nirvana_deploy.model.modeling_nirvana")


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The modules of a model without any weights: parameters live on torch's meta device."""
    with torch.device("meta"):
        return model_class(config, FAMILIES[config.model_type])(config).eval()


def _require_generation_config(folder: Path) -> None:
    """Raise NirvanaError for a generation_config.json that transformers does not take."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # of any kind: it compares and converts what stands there
        raise NirvanaError(f"{path}: transformers does not take it: {reason_of(error)}.") from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers' own progress bar off the user's terminal, and leave its setting as it was."""
    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()


def model_record(source: ModelFolder) -> dict[str, Any]:
    """What the manifest says about the input, sha256 included."""
    files = sorted([*source.path.glob("*.safetensors"), *source.path.glob("*.json")])
    return {
        "name": source.name,
        "origin": source.origin,
        "licence": source.licence,
        "hub_id": source.hub_id,
        "card": source_card(source.path),
        "path": str(source.path),
        "files": {file.name: sha256_of(file) for file in files},
    }
