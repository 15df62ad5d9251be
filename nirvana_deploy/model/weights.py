"""Weights read one tensor at a time from safetensors, never all at once.

Everything downstream (score, slice, export) asks a :class:`WeightSource` for tensors by name, so memory
is bounded by what is in use, not by the model. A source can be a view of another one: slicing and
masking are views (``prune/slicing.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.shape import ModelShape
from nirvana_deploy.model.weight_files import INDEX_FILE, SINGLE_FILE, file_by_tensor

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


Rows = slice | torch.Tensor
"""Which rows: a range, or int64 positions."""
_CHECKED_ELEMENTS = 1 << 22


class WeightSource(Protocol):
    """Tensors by name, loaded when asked for."""

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without loading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, without loading it."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in its stored dtype."""
        ...

    def rows(self, name: str, positions: Rows) -> torch.Tensor:
        """Some rows of the tensor, as :meth:`load` would give them, without reading the others."""
        ...


class SafetensorsWeights:
    """The tensors of a folder with ``model.safetensors`` or a sharded checkpoint with its index.

    Raises NirvanaError for a folder without safetensors, an index that names a missing shard, a truncated
    or corrupt file, and (on ``load`` and ``rows``) where what is read holds NaN or Inf.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of = _files_by_tensor(folder)
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in sorted(set(self._file_of.values())):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    view = tensors.get_slice(name)
                    self._headers[name] = (tuple(view.get_shape()), view.get_dtype())
        missing = sorted(set(self._file_of) - set(self._headers))
        if missing:
            raise NirvanaError(
                f"{folder / INDEX_FILE} places {missing[0]!r} in {self._file_of[missing[0]].name}, "
                "which does not hold it.",
                hint="Download the model again.",
            )

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        return sorted(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, from the file's header."""
        code = self._header(name)[1]
        if code not in _TORCH_DTYPES:
            raise NirvanaError(
                f"Tensor {name!r} is stored as {code}; supported are {', '.join(_TORCH_DTYPES)}.",
                hint="Quantized checkpoints cannot be pruned; start from the float model.",
            )
        return _TORCH_DTYPES[code]

    def load(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype; raises NirvanaError when it holds NaN or Inf."""
        return self._finite(name, self._mapped(name))

    def rows(self, name: str, positions: Rows) -> torch.Tensor:
        """Some rows of the tensor; only they are read from disk and checked for NaN and Inf."""
        return self._finite(name, self._mapped(name)[positions])

    def _mapped(self, name: str) -> torch.Tensor:
        """The tensor as a view of its file: what is not touched is not read."""
        self.dtype(name)
        with _opened(self._file_of[name]) as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # one pass without copies; NaN is passed on to both ends
        if not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
            blocks = torch.split(tensor.flatten(), _CHECKED_ELEMENTS)
            bad = sum(int((~torch.isfinite(block)).sum()) for block in blocks)
            raise NirvanaError(
                f"Tensor {name!r} of {self._file_of[name].name} holds {bad} NaN or infinite values.",
                hint="The checkpoint is damaged; download or train it again.",
            )
        return tensor

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            raise NirvanaError(f"The checkpoint in {self._folder} has no tensor {name!r}.")
        return self._headers[name]


class RememberedWeights:
    """A source that reads every tensor once, until it is told to :meth:`forget` what it has read."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._tensors: dict[str, torch.Tensor] = {}

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without loading it."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, without loading it."""
        return self._source.dtype(name)

    def load(self, name: str) -> torch.Tensor:
        """The tensor; not to be changed."""
        if name not in self._tensors:
            self._tensors[name] = self._source.load(name)
        return self._tensors[name]

    def rows(self, name: str, positions: Rows) -> torch.Tensor:
        """Some rows of the tensor; these are not remembered."""
        return self._source.rows(name, positions)

    def forget(self) -> None:
        """Free what was read."""
        self._tensors.clear()


def check_weights(weights: WeightSource, shape: ModelShape) -> None:
    """Raise NirvanaError unless every tensor of ``shape`` is there with the dimensions that it says."""
    for name, expected in expected_shapes(shape).items():
        found = weights.shape(name)
        if found != expected:
            raise NirvanaError(
                f"Tensor {name!r} has shape {list(found)}, but config.json asks for {list(expected)}."
            )


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a model of this shape consists of."""
    family, D, d = shape.family, shape.hidden_size, shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {f"{family.embedding}.weight": (shape.vocab_size, D)}
    for stack in family.stacks:
        tensors[f"{stack.final_norm}.weight"] = (D,)
    if not shape.tied_embeddings:
        tensors[f"{family.head}.weight"] = (shape.vocab_size, D)
    for index, layer in enumerate(shape.layers):
        site, prefix = shape.place(index)
        linears = {
            site.q: (layer.query_heads * d, D, shape.attention_bias),
            site.k: (layer.kv_heads * d, D, shape.attention_bias),
            site.v: (layer.kv_heads * d, D, shape.attention_bias),
            site.o: (D, layer.query_heads * d, shape.output_bias),
        }
        if site.ffn_rows:
            linears[site.ffn_down] = (D, layer.ffn_width, shape.ffn_bias)
            linears |= dict.fromkeys(site.ffn_rows, (layer.ffn_width, D, shape.ffn_bias))
        for module, (rows, columns, bias) in linears.items():
            tensors[f"{prefix}.{module}.weight"] = (rows, columns)
            if bias:
                tensors[f"{prefix}.{module}.bias"] = (rows,)
        for norm in filter(None, (site.input_norm, site.ffn_norm)):
            tensors[f"{prefix}.{norm}.weight"] = (D,)
        for norm in filter(None, (site.q_norm, site.k_norm)):
            tensors[f"{prefix}.{norm}.weight"] = (d,)
    for site in family.sites:
        if site.position_bias:
            tensors[f"{site.layer(0)}.{site.position_bias}.weight"] = shape.position_bias
    return tensors


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if index.is_file() and not single.is_file():
        return file_by_tensor(index)
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise NirvanaError(f"{folder} holds no *.safetensors file.")
    owners: dict[str, Path] = {}
    for file in files:
        with _opened(file) as tensors:
            owners.update(dict.fromkeys(tensors.keys(), file))
    return owners


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise NirvanaError(
            f"{file} is truncated or corrupt: {error}.", hint="Download the file again."
        ) from error
