"""Run whole windows of text through an ONNX folder, and look at any value inside its graphs.

A decoder reads a window as a prompt. In an encoder-decoder the encoder reads the first half and the decoder
the start token and the second half, as when the model was scored; the encoder's states go to the decoder.
Every flavor of the exporter is known by the inputs of its graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from nirvana_deploy.artifact import read_json
from nirvana_deploy.errors import NirvanaError
from nirvana_deploy.export.ort_session import default_threads

LOGITS = "logits"
_ENCODER_STATES = "encoder_hidden_states"
_LAST_HIDDEN_STATE = "last_hidden_state"
Feeds = Mapping[str, NDArray[Any]]
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Runner:
    """The graphs of one folder in CPU sessions of ONNX Runtime; the files stay as they are.

    ``outputs`` names, per file, values inside the graph to be given out; by default only the logits are.
    """

    def __init__(
        self,
        folder: Path,
        *,
        outputs: Mapping[str, Sequence[str]] | None = None,
        threads: int | None = None,
    ) -> None:
        self._folder = folder
        self._outputs = outputs or {}
        self._sessions = {
            path.name: session_with_outputs(path, self._outputs.get(path.name, ()), threads=threads)
            for path in sorted(folder.glob("*.onnx"))
        }
        self._start_token: int | None = None

    def values(
        self, window: NDArray[np.int64], *, given: Mapping[str, Feeds] | None = None
    ) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
        """(file, values by name) of one window [T], for every graph in the order of the computation.

        The values are those asked for, and ``logits`` [1, T, V] where the graph has them. ``given`` are
        further inputs, by file.
        """
        also = given or {}
        encoders = [name for name, session in self._sessions.items() if not _has_logits(session)]
        decoders = [name for name in self._sessions if name not in encoders]
        if not encoders:
            for name in decoders:
                yield name, self._run(name, {"input_ids": window[None], **also.get(name, {})})
            return
        half = len(window) // 2
        first, second = window[None, :half], window[None, half:]
        states: NDArray[Any] = np.empty(0)
        for name in encoders:
            values = self._run(name, {"input_ids": first, **also.get(name, {})}, extra=(_LAST_HIDDEN_STATE,))
            states = values[_LAST_HIDDEN_STATE]
            yield name, values
        start = np.full((1, 1), self._decoder_start(), dtype=np.int64)
        for name in decoders:
            prompt = {
                "input_ids": np.concatenate([start, second], axis=1),
                _ENCODER_STATES: states,
                "encoder_attention_mask": np.ones_like(first),
            }
            yield name, self._run(name, {**prompt, **also.get(name, {})})

    def logits(
        self, window: NDArray[np.int64], *, given: Mapping[str, Feeds] | None = None
    ) -> NDArray[np.float32]:
        """[T', V]: logits of one window at the positions where the decoder read it."""
        found = None
        for _, values in self.values(window, given=given):
            found = values.get(LOGITS, found)
        if found is None:
            raise NirvanaError(f"{self._folder} has no graph with an output 'logits'.")
        logits: NDArray[np.float32] = found[0].astype(np.float32, copy=False)
        return logits

    def _run(self, name: str, given: Feeds, *, extra: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        session = self._sessions[name]
        wanted = [*self._outputs.get(name, ()), *extra, *([LOGITS] if _has_logits(session) else [])]
        feeds = prompt_feeds(session.get_inputs(), given, where=self._folder / name)
        return dict(zip(wanted, session.run(wanted, feeds), strict=True))

    def _decoder_start(self) -> int:
        if self._start_token is None:
            config = self._folder / "config.json"
            token = read_json(config).get("decoder_start_token_id") if config.is_file() else None
            self._start_token = int(token or 0)  # T5 starts with its padding token, 0
        return self._start_token


def prompt_feeds(inputs: Sequence[Any], given: Feeds, *, where: Path) -> dict[str, NDArray[Any]]:
    """All ``inputs`` of a session for prompts ``input_ids`` [B, T] without padding and without a past."""
    tokens = given["input_ids"]
    known: dict[str, NDArray[Any]] = {
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy(),
        "write_indices": np.zeros(len(tokens), dtype=np.int64),
        "use_cache_branch": np.zeros(1, dtype=np.bool_),
        **given,
    }
    feeds: dict[str, NDArray[Any]] = {}
    for node in inputs:
        dtype = _DTYPES.get(node.type)
        if node.name in known:
            array = known[node.name]
            feeds[node.name] = array if dtype is None else array.astype(dtype, copy=False)
        elif node.name.startswith("past_key_values.") and dtype is not None:
            slots = node.shape[2] if isinstance(node.shape[2], int) else 0
            feeds[node.name] = np.zeros((len(tokens), node.shape[1], slots, node.shape[3]), dtype=dtype)
        else:
            raise NirvanaError(
                f"{where} asks for the input {node.name!r} ({node.type}), which this runner does not know.",
                hint="nirvana-deploy export CHECKPOINT --out DIR writes graphs that it knows.",
            )
    return feeds


def session_with_outputs(path: Path, names: Sequence[str], *, threads: int | None = None) -> Any:
    """A CPU session of the graph at ``path`` whose values ``names`` can be asked for."""
    model = onnx.load(path, load_external_data=False)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return session_of(model, path.parent, threads=threads)


def session_of(
    model: onnx.ModelProto, folder: Path, *, threads: int | None = None, optimized: Path | None = None
) -> Any:
    """A CPU session of a graph in memory, its external data in ``folder``.

    ``optimized``: also write the graph that ONNX Runtime made of it. Raises NirvanaError when it refuses.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # an output without a declared shape is meant
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.disable_prepacking", "1")  # nothing will be run
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the binding has no common base class for its load errors
        raise NirvanaError(f"ONNX Runtime cannot load the graph of {folder}: {error}") from error


def _has_logits(session: Any) -> bool:
    return any(output.name == LOGITS for output in session.get_outputs())
