"""Weights read one tensor at a time from safetensors, never all at once.

Everything downstream (score, slice, export) asks a :class:`WeightSource` for tensors by name, so memory
is bounded by what is in use, not by the model. A source can be a view of another one: slicing and
masking are views (``prune/slicing.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import require_file
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
                names = set(tensors.keys())
                self._require_as_indexed(file, names)
                for name in names:
                    view = tensors.get_slice(name)
                    self._headers[name] = (tuple(view.get_shape()), view.get_dtype())

    def _require_as_indexed(self, file: Path, names: set[str]) -> None:
        """Raise NirvanaError unless ``file`` holds what the index places in it: transformers takes all."""
        indexed = {name for name, shard in self._file_of.items() if shard == file}
        if lacking := sorted(indexed - names):
            raise NirvanaError(
                f"{self._folder / INDEX_FILE} places {lacking[0]!r} in {file.name}, which does not hold it.",
                hint="Download the model again.",
            )
        if more := sorted(names - indexed):
            place = self._file_of[more[0]].name if more[0] in self._file_of else "no file"
            raise NirvanaError(
                f"{file} holds {more[0]!r}, which {INDEX_FILE} places in {place}: transformers would read "
                "it, and this tool would not.",
                hint="Download the model again, or save it once more with transformers.",
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
    """Raise NirvanaError unless the tensors of ``shape`` are there, as floats of its sizes, and no others."""
    expected = expected_shapes(shape)
    for name, dimensions in expected.items():
        found = weights.shape(name)
        if found != dimensions:
            raise NirvanaError(
                f"Tensor {name!r} has shape {list(found)}, but config.json asks for {list(dimensions)}."
            )
        weights.dtype(name)
    unused = [name for name in weights.names() if name not in expected and not _may_lie_unused(name, shape)]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        raise NirvanaError(
            f"The weights hold tensors that a {shape.family.architecture} of this config.json does not read: "
            f"{', '.join(unused[:3])}{more}.",
            hint="Correct config.json, or choose the model that these weights belong to: without them it "
            "would compute something else. If nothing needs them, save the model again with transformers.",
        )
    for name in _copies_of_embedding(shape):
        if name in weights.names() and not _same(weights, name, f"{shape.family.embedding}.weight"):
            raise NirvanaError(
                f"Tensor {name!r} differs from '{shape.family.embedding}.weight': "
                "a model with two embeddings is not supported."
            )


def with_own_head(shape: ModelShape, weights: WeightSource) -> ModelShape:
    """``shape``, untied if a head is stored that differs from the embedding, as transformers decides."""
    head, embedding = f"{shape.family.head}.weight", f"{shape.family.embedding}.weight"
    stored = set(weights.names())
    if not shape.tied_embeddings or not {head, embedding} <= stored or _same(weights, head, embedding):
        return shape
    return replace(shape, tied_embeddings=False)


def _may_lie_unused(name: str, shape: ModelShape) -> bool:
    tied = [f"{shape.family.head}.weight"] if shape.tied_embeddings else []  # the same, see with_own_head
    return name in (*tied, *_copies_of_embedding(shape)) or any(
        re.fullmatch(pattern, name) for pattern in shape.family.unused
    )


def _copies_of_embedding(shape: ModelShape) -> list[str]:
    return [f"{module}.weight" for module in shape.family.embedding_copies]


def _same(weights: WeightSource, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; they are read block by block."""
    if weights.shape(one) != weights.shape(other):
        return False
    rows, columns = weights.shape(one)
    step = max(1, _CHECKED_ELEMENTS // max(columns, 1))
    return all(
        torch.equal(weights.rows(one, block).float(), weights.rows(other, block).float())
        for block in (slice(start, start + step) for start in range(0, rows, step))
    )


def expected_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a model of this shape consists of."""
    family, D, d = shape.family, shape.hidden_size, shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {f"{family.embedding}.weight": (shape.vocab_size, D)}
    tensors |= norm_shapes(shape)
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
    for site in family.sites:
        if site.position_bias:
            tensors[f"{site.layer(0)}.{site.position_bias}.weight"] = shape.position_bias
    return tensors


def stored_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """:func:`expected_shapes` as a checkpoint stores them: fused linears are one tensor."""
    expected, fused = expected_shapes(shape), _fused(shape)
    first = {parts[0]: name for name, parts in fused.items()}
    later = {part for parts in fused.values() for part in parts[1:]}
    stored: dict[str, tuple[int, ...]] = {}
    for name, dimensions in expected.items():
        if name in first:
            rows = sum(expected[part][0] for part in fused[first[name]])
            stored[first[name]] = (rows, *dimensions[1:])
        elif name not in later:
            stored[name] = dimensions
    return stored


def _fused(shape: ModelShape) -> dict[str, tuple[str, ...]]:
    """Name of a tensor that is stored as one -> names of the linears in it, in order."""
    found = {}
    for index in range(len(shape.layers)):
        site, prefix = shape.place(index)
        for module in site.fused:
            parts = tuple(f"{prefix}.{part}.weight" for part in site.parts(module))
            found[f"{prefix}.{module}.weight"] = parts
    return found


class SplitWeights:
    """Weights of which fused tensors are the linears that lie in them."""

    def __init__(self, source: WeightSource, shape: ModelShape) -> None:
        self._source, self._stored = source, stored_shapes(shape)
        expected, self._place = expected_shapes(shape), dict[str, tuple[str, int, int]]()
        for whole, parts in _fused(shape).items():
            start = 0
            for part in parts:
                self._place[part] = (whole, start, start + expected[part][0])
                start += expected[part][0]

    def names(self) -> Sequence[str]:
        """All tensor names, sorted; parts in place of what they lie in."""
        wholes = {whole for whole, _, _ in self._place.values()}
        found = [name for name in self._source.names() if name not in wholes]
        return sorted([*found, *(part for part, (whole, _, _) in self._place.items() if whole in wholes)])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a part or tensor; raises NirvanaError where what parts lie in has another."""
        if name not in self._place:
            return self._source.shape(name)
        whole, start, stop = self._place[name]
        found, wanted = self._source.shape(whole), self._stored[whole]
        if found != wanted:
            raise NirvanaError(
                f"Tensor {whole!r} has shape {list(found)}, but config.json asks for {list(wanted)}."
            )
        return (stop - start, *wanted[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._source.dtype(self._place[name][0] if name in self._place else name)

    def load(self, name: str) -> torch.Tensor:
        """The tensor, or the rows of the part."""
        if name not in self._place:
            return self._source.load(name)
        whole, start, stop = self._place[name]
        return self._source.rows(whole, slice(start, stop))

    def rows(self, name: str, positions: Rows) -> torch.Tensor:
        """Some rows of the tensor or part."""
        return self.load(name)[positions] if name in self._place else self._source.rows(name, positions)


class JoinedWeights:
    """The way back: weights of a model of ``shape`` as a checkpoint stores them."""

    def __init__(self, source: WeightSource, shape: ModelShape) -> None:
        self._source, self._fused, self._stored = source, _fused(shape), stored_shapes(shape)

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as it is stored."""
        return self._stored[name] if name in self._fused else self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._source.dtype(self._fused[name][0] if name in self._fused else name)

    def load(self, name: str) -> torch.Tensor:
        """The tensor; of a fused one, its parts behind each other."""
        if name not in self._fused:
            return self._source.load(name)
        return torch.cat([self._source.load(part) for part in self._fused[name]])

    def rows(self, name: str, positions: Rows) -> torch.Tensor:
        """Some rows of the tensor."""
        return self.load(name)[positions] if name in self._fused else self._source.rows(name, positions)


def joined(parts: Mapping[str, torch.Tensor], shape: ModelShape) -> dict[str, torch.Tensor]:
    """Tensors of a model of ``shape`` as a checkpoint stores them: fused linears in place of their parts."""
    found = dict(parts)
    for whole, names in _fused(shape).items():
        if names[0] in found:
            found[whole] = torch.cat([found.pop(name) for name in names])
    return found


def norm_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weight of every norm."""
    D, d = shape.hidden_size, shape.head_dim
    norms = {stack.final_norm: D for stack in shape.family.stacks}
    for index, layer in enumerate(shape.layers):
        site, prefix = shape.place(index)
        of_states = (site.input_norm, site.attention_post_norm, site.ffn_norm, site.ffn_post_norm)
        norms |= {f"{prefix}.{norm}": D for norm in of_states if norm}
        for norm, heads in ((site.q_norm, layer.query_heads), (site.k_norm, layer.kv_heads)):
            if norm:
                norms[f"{prefix}.{norm}"] = heads * d if site.norms_all_heads else d
    return {f"{norm}.weight": (width,) for norm, width in norms.items()}


class OffsetNorms:
    """Weights of which the norms are as they are multiplied with: what is stored plus ``offset``, float32."""

    def __init__(self, source: WeightSource, shape: ModelShape, offset: float) -> None:
        self._source, self._norms, self._offset = source, norm_shapes(shape), offset

    def names(self) -> Sequence[str]:
        """All tensor names, sorted; the same as the source's."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The same as the source's."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """float32 of a norm, else the source's."""
        return torch.float32 if name in self._norms else self._source.dtype(name)

    def load(self, name: str) -> torch.Tensor:
        """The tensor, with the offset where it is a norm's."""
        tensor = self._source.load(name)
        return tensor.float() + self._offset if name in self._norms else tensor

    def rows(self, name: str, positions: Rows) -> torch.Tensor:
        """Some rows of the tensor."""
        return self.load(name)[positions] if name in self._norms else self._source.rows(name, positions)


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
    require_file(file)
    try:
        return safe_open(file, framework="pt")
    except MemoryError as error:
        raise NirvanaError(f"{file} has {file.stat().st_size:,} bytes, too many for this process.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise NirvanaError(
            f"{file} is truncated or corrupt: {error}.", hint="Download the file again."
        ) from error
