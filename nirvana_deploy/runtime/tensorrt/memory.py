"""What an engine's tensors need on the device, computed from its record before the device is touched.

Every buffer is as large as the largest profile can ask, so that no step allocates. The cache of ``concat``
form exists twice (a step reads one copy and writes the longer other), that of ``in-place`` form once.

N sequences, T new tokens, S tokens seen before, C slots of an in-place cache; K, d, V as in
``model/shape.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.runtime.tensorrt.record import EngineRecord, TensorRecord, is_part_of_seq2seq

ITEM_BYTES = {
    "bool": 1,
    "int8": 1,
    "float8": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "int32": 4,
    "int64": 8,
}
LOGITS = "logits"
PAST, PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class Limits:
    """What the engine's profiles can take together."""

    batch_size: int
    """Most sequences N."""
    step_tokens: int
    """Most new tokens T of one pass."""
    total_tokens: int
    """Most tokens of a sequence, prompt and answer together."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of every buffer, by the name of the tensor."""

    limits: Limits
    token_inputs_bytes: dict[str, int]
    """Inputs that are no cache: ids, mask, positions or write indices."""
    logits_bytes: int
    """Of the largest pass."""
    decode_logits_bytes: int
    """Of the largest pass of one new token."""
    cache_bytes: dict[str, int]
    """Each ``past_key_values.{i}.key|value``: one copy."""
    cache_copies: int
    """2 for ``concat``, 1 for ``in-place``."""

    @property
    def kv_cache_bytes(self) -> int:
        """All copies of all caches."""
        return self.cache_copies * sum(self.cache_bytes.values())

    @property
    def device_bytes(self) -> int:
        """Everything that the runner allocates beside the engine's weights and scratch memory."""
        return self.kv_cache_bytes + self.logits_bytes + sum(self.token_inputs_bytes.values())


def plan_memory(record: EngineRecord) -> MemoryPlan:
    """The buffers of a decoder engine; raises NirvanaError where the record is none of a decoder."""
    inputs = {tensor.name: tensor for tensor in record.inputs}
    outputs = {tensor.name: tensor for tensor in record.outputs}
    caches = [name for name in inputs if name.startswith(PAST)]
    decodes = record.kv != "none" and caches and LOGITS in outputs and "input_ids" in inputs
    if not decodes or is_part_of_seq2seq(record):
        raise NirvanaError(
            f"{record.engine_file} is of the part {record.part!r}, its KV cache {record.kv!r}; running needs "
            "a decoder with input_ids, past_key_values.0.key, ... and logits."
        )
    limits = _limits(record)
    logits = outputs[LOGITS]
    per_pass = max(
        _bytes_of(logits, known=(*profile.shapes["input_ids"][2], None)) for profile in record.profiles
    )
    return MemoryPlan(
        limits=limits,
        token_inputs_bytes={
            name: max(_bytes(inputs[name], profile.shapes[name][2]) for profile in record.profiles)
            for name in inputs
            if name not in caches
        },
        logits_bytes=per_pass,
        decode_logits_bytes=_bytes_of(logits, known=(limits.batch_size, 1, None)),
        cache_bytes={
            name: _bytes_of(inputs[name], known=(limits.batch_size, None, limits.total_tokens, None))
            for name in caches
        },
        cache_copies=1 if record.kv == "in-place" else 2,
    )


def plan_seq2seq_memory(record: EngineRecord) -> MemoryPlan:
    """The buffers of an encoder-decoder's decoder; both its caches exist twice.

    A pass reads one token of each sequence, and gives back what it was given of the cross-attention's cache.
    Raises NirvanaError where the record is none of such a decoder.
    """
    inputs = {tensor.name: tensor for tensor in record.inputs}
    logits = next((tensor for tensor in record.outputs if tensor.name == LOGITS), None)
    caches = [name for name in inputs if name.startswith(PAST)]
    if not caches or logits is None:
        raise NirvanaError(
            f"{record.engine_file} is of the part {record.part!r}; an encoder-decoder is opened by its "
            f"decoder's engine, with caches and logits."
        )
    most = {
        name: [max(sizes) for sizes in zip(*(p.shapes[name][2] for p in record.profiles), strict=True)]
        for name in inputs
    }
    past = max(most[name][2] for name in caches if ".decoder." in name)
    limits = Limits(batch_size=most["input_ids"][0], step_tokens=1, total_tokens=past + 1)
    logits_bytes = _bytes_of(logits, known=(limits.batch_size, 1, None))
    cache_bytes = {}
    for name in caches:
        N, K, kept, d = most[name]
        kept = past + 1 if ".decoder." in name else kept
        cache_bytes[name] = _bytes(inputs[name], (N, K, kept, d))
    return MemoryPlan(
        limits=limits,
        token_inputs_bytes={"input_ids": _bytes(inputs["input_ids"], (limits.batch_size, 1))},
        logits_bytes=logits_bytes,
        decode_logits_bytes=logits_bytes,
        cache_bytes=cache_bytes,
        cache_copies=2,
    )


def largest_bytes(record: EngineRecord, name: str) -> int:
    """Bytes of an input at the largest shape of any profile."""
    tensor = next(one for one in record.inputs if one.name == name)
    return max(_bytes(tensor, profile.shapes[name][2]) for profile in record.profiles)


def _limits(record: EngineRecord) -> Limits:
    tokens = [profile.shapes["input_ids"][2] for profile in record.profiles]
    if record.kv == "in-place":
        caches = (t for t in record.inputs if t.name.startswith(PAST))
        total = next(caches).shape[2]
        if total is None:
            raise NirvanaError(f"{record.engine_file}: the length of an in-place cache must be static.")
    else:
        total = max(profile.shapes["attention_mask"][2][1] for profile in record.profiles)
    return Limits(
        batch_size=max(shape[0] for shape in tokens),
        step_tokens=max(shape[1] for shape in tokens),
        total_tokens=total,
    )


def _bytes_of(tensor: TensorRecord, *, known: tuple[int | None, ...]) -> int:
    """Bytes of a tensor whose varying dimensions are ``known``; static ones count as they are."""
    shape = [own if own is not None else given for own, given in zip(tensor.shape, known, strict=True)]
    if any(size is None for size in shape):
        raise NirvanaError(f"{tensor.name}: dimensions {tensor.shape} leave more open than expected.")
    return _bytes(tensor, tuple(size for size in shape if size is not None))


def _bytes(tensor: TensorRecord, shape: tuple[int, ...]) -> int:
    if tensor.dtype not in ITEM_BYTES:
        raise NirvanaError(f"{tensor.name} is {tensor.dtype}; known are {', '.join(ITEM_BYTES)}.")
    return math.prod(shape) * ITEM_BYTES[tensor.dtype]
