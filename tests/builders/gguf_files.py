"""GGUF files with keys and tensors that no exporter of ours writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from builders.extras import needs
from builders.tiny import VOCABULARY


def write_merges(folder: Path) -> None:
    """A byte-level tokenizer with merges, without which llama.cpp takes none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the rivers carry the water to the sea"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def rewritten(
    source: Path,
    out: Path,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
    extra: Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
) -> Path:
    """Copy a float32 GGUF file with ``keys`` (without the architecture's name) and ``tensors`` changed."""
    gguf = needs("gguf")
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    changed = {f"{architecture}.{key}": value for key, value in (keys or {}).items()} | dict(extra or {})
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in {"general.architecture", *changed, *drop}:
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for name, value in changed.items():
        if type(value) is int:
            writer.add_uint32(name, value)  # another type is refused by llama.cpp
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    held = {tensor.name: np.array(tensor.data) for tensor in reader.tensors} | dict(tensors or {})
    for name, tensor in held.items():
        if name not in drop:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
