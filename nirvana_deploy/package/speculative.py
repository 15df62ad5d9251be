"""One folder for onnxruntime-genai with a target and the draft that proposes its tokens.

```
model.onnx  model.onnx.data  tokenizer...    the target's own, by links where the disk allows them
draft/model.onnx  draft/model.onnx.data      the draft's
genai_config.json                            the target's, with the draft's decoder under model.draft
```
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from nirvana_deploy.base.artifact import files_under, link, whole_folder, write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.marker import CARD
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.text.tokenizer import tokenizer_in
from nirvana_deploy.output.layout import (
    DATA_FILE,
    DRAFT,
    FLAVOR_KEY,
    GENAI_FILE,
    MODEL_FILE,
    SPECULATIVE_FILE,
    is_seq2seq,
    is_speculative,
)
from nirvana_deploy.runtime.genai import MOST_DRAFT_TOKENS

_FLAVOR = "gqa"
_GRAPH_FILES = (MODEL_FILE, DATA_FILE)
_OF_ONE_MODEL = ("quantization.json", "sensitivity.svg", SPECULATIVE_FILE, CARD)
"""Records of the target alone, and its card."""


def write_speculative(target: Path, draft: Path, out: Path, *, draft_tokens: int) -> None:
    """Write the ONNX folders ``target`` and ``draft`` as the folder ``out``, whole or not at all.

    Raises NirvanaError as :func:`require_pair` does, and for ``draft_tokens`` that onnxruntime-genai refuses.
    """
    if not 1 <= draft_tokens <= MOST_DRAFT_TOKENS:
        raise NirvanaError(
            f"A draft proposes 1 to {MOST_DRAFT_TOKENS} tokens at a time, got {draft_tokens}.",
            hint="Leave out --draft-tokens: 1 to 6 are tried, and the fastest is taken.",
        )
    require_pair(target, draft)
    config = speculative_config(
        read_json(target / GENAI_FILE), read_json(draft / GENAI_FILE), draft_tokens=draft_tokens
    )
    with whole_folder(out) as folder:
        for file in files_under(target):
            if file.parent == target and file.name not in (GENAI_FILE, *_OF_ONE_MODEL):
                link(file, folder / file.name)
        (folder / DRAFT).mkdir()
        for name in _GRAPH_FILES:
            if (draft / name).is_file():
                link(draft / name, folder / DRAFT / name)
        write_json(folder / GENAI_FILE, config)


def speculative_config(
    target: Mapping[str, Any], draft: Mapping[str, Any], *, draft_tokens: int
) -> dict[str, Any]:
    """The genai_config.json of both; the shorter context is theirs."""
    context_tokens = min(one["model"]["context_length"] for one in (target, draft))
    drafting = {**draft["model"]["decoder"], "filename": f"{DRAFT}/{MODEL_FILE}"}
    return {
        **target,
        "model": {**target["model"], "context_length": context_tokens, "draft": drafting},
        "search": {**target["search"], "max_length": min(target["search"]["max_length"], context_tokens)},
        "speculative": {"max_draft_tokens": draft_tokens},
    }


def set_draft_tokens(folder: Path, draft_tokens: int) -> None:
    """Let the draft of ``folder`` propose ``draft_tokens`` at a time."""
    config = read_json(folder / GENAI_FILE)
    write_json(folder / GENAI_FILE, {**config, "speculative": {"max_draft_tokens": draft_tokens}})


def require_pair(target: Path, draft: Path) -> None:
    """Raise NirvanaError unless onnxruntime-genai can run ``target`` with ``draft``: which is at fault."""
    for role, folder in (("target", target), ("draft", draft)):
        _require_usable(role, folder)
    if target.resolve() == draft.resolve():
        raise NirvanaError(
            f"Target and draft are one model, {target}.", hint="The draft is the smaller one: --draft NAME"
        )
    sizes = [int(read_json(one / GENAI_FILE)["model"]["vocab_size"]) for one in (target, draft)]
    if sizes[0] != sizes[1]:
        raise NirvanaError(
            f"The target has a vocabulary of {sizes[0]:,} tokens, the draft one of {sizes[1]:,}: a draft's "
            "tokens have to be the target's.",
            hint="Draft with a model that was pruned from the target.",
        )
    _require_one_tokenizer(target, draft)


def _require_usable(role: str, folder: Path) -> None:
    if is_seq2seq(folder):
        raise NirvanaError(
            f"The {role}, {folder}, is an encoder-decoder: onnxruntime-genai drafts for decoders alone."
        )
    if is_speculative(folder):
        raise NirvanaError(
            f"The {role}, {folder}, has a draft already.", hint="Name the folder that it was made from."
        )
    if not (folder / MODEL_FILE).is_file():
        raise NirvanaError(
            f"The {role}, {folder}, holds no {MODEL_FILE}.",
            hint="nirvana-deploy export CHECKPOINT --flavor gqa --out DIR",
        )
    flavor = _flavor_of(folder)
    if flavor != _FLAVOR or not (folder / GENAI_FILE).is_file():
        raise NirvanaError(
            f"The {role}, {folder}, is of flavor {flavor}: onnxruntime-genai takes refused tokens back "
            f"out of the cache of flavor {_FLAVOR} alone.",
            hint=f"Export it so, and quantize it again: nirvana-deploy export CHECKPOINT --flavor {_FLAVOR} "
            f"--out DIR. A whole job: nirvana-deploy prune-export MODEL --sparsity 0.2 --flavor {_FLAVOR}",
        )


def _flavor_of(folder: Path) -> str:
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False)
    found: dict[str, str] = {entry.key: entry.value for entry in graph.metadata_props}
    return found.get(FLAVOR_KEY, "unknown")


def _require_one_tokenizer(target: Path, draft: Path) -> None:
    files = [folder / "tokenizer.json" for folder in (target, draft)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    own, other = (tokenizer_in(folder).get_vocab() for folder in (target, draft))
    if own != other:
        differing = len(own.items() ^ other.items())
        raise NirvanaError(
            f"The tokenizers differ: the target's has {len(own):,} tokens, the draft's {len(other):,}, and "
            f"{differing:,} of them are not the same in both.",
            hint="Draft with a model that was pruned from the target.",
        )
