"""One model in one runtime, in a process of its own: the other end of ``peer_process.py``.

    python benchmarks/peer_worker.py KIND PATH THREADS        (KIND: of KINDS below, or a runtime of ours)

Reads requests as lines of JSON and answers each with one: ``{"tokens", "new_tokens"}`` is timed, greedily;
``{"windows", "file"}`` writes float32 logits [M, T - 1, V] that predict the last T - 1 tokens of each window.
Needs the runtime and numpy alone, since some runtimes want an environment of their own. llama.cpp is driven
by ``peer_llama_cpp.mjs``, which answers the same requests.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ahead of the import of ONNX Runtime

import numpy as np
from numpy.typing import NDArray


class Model(Protocol):
    """A loaded model with room for one sequence."""

    about: dict[str, str]
    """Versions, and settings that its runtime chose."""

    def read(self, tokens: list[int], room: int) -> int:
        """Forget all, read a prompt, with ``room`` tokens to come; the id of the next token."""
        ...

    def step(self, token: int) -> int:
        """Read one more token; the id of the next."""
        ...

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Forget all; logits [T, V] behind each of the tokens."""
        ...


class Transformers:
    """Anything that is called like a model of transformers: eager, or ONNX Runtime by optimum."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = self.opened(path, threads)
        self.about = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.past: Any = None
        self.length = 0

    def opened(self, path: Path, threads: int) -> Any:
        """The model, loaded."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path, dtype=self.torch.float32).eval()

    def passed(self, tokens: list[int]) -> Any:
        """Logits [T, V] behind each of some more tokens."""
        self.length += len(tokens)
        mask = self.torch.ones(1, self.length, dtype=self.torch.int64)
        with self.torch.inference_mode():
            found = self.model(
                input_ids=self.torch.tensor([tokens]),
                attention_mask=mask,
                position_ids=self.torch.arange(self.length - len(tokens), self.length)[None],
                past_key_values=self.past,
                use_cache=True,
            )
        self.past = found.past_key_values
        return found.logits[0]

    def read(self, tokens: list[int], room: int) -> int:
        """As of :class:`Model`."""
        self.past, self.length = None, 0
        return self.step_of(tokens)

    def step(self, token: int) -> int:
        """As of :class:`Model`."""
        return self.step_of([token])

    def step_of(self, tokens: list[int]) -> int:
        """The next token behind some more."""
        return int(self.passed(tokens)[-1].argmax())

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """As of :class:`Model`."""
        self.past, self.length = None, 0
        found: NDArray[np.float32] = self.passed(tokens).numpy()
        return found


class Compiled(Transformers):
    """Prompts as they are, steps by ``torch.compile`` over a cache of a fixed size, as ``generate`` does."""

    ROOM = 1024
    """Positions of the cache; one size, so that steps are compiled once."""

    def opened(self, path: Path, threads: int) -> Any:
        """The model, with a compiled step beside it."""
        model = super().opened(path, threads)
        self.compiled = self.torch.compile(model.forward)
        return model

    def read(self, tokens: list[int], room: int) -> int:
        """As of :class:`Model`."""
        from transformers import StaticCache

        self.past = StaticCache(config=self.model.config, max_cache_len=self.ROOM)
        self.length = len(tokens)
        with self.torch.no_grad():
            ids = self.torch.tensor([tokens])
            found = self.model(input_ids=ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        return int(found.logits[0, -1].argmax())

    def step(self, token: int) -> int:
        """As of :class:`Model`."""
        position = self.torch.tensor([[self.length]])
        self.length += 1
        with self.torch.no_grad():
            found = self.compiled(
                input_ids=self.torch.tensor([[token]]),
                position_ids=position,
                past_key_values=self.past,
                use_cache=True,
            )
        return int(found.logits[0, -1].argmax())


class Optimum(Transformers):
    """optimum-onnx."""

    def opened(self, path: Path, threads: int) -> Any:
        """The exported folder, loaded."""
        import onnxruntime
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return ORTModelForCausalLM.from_pretrained(path, session_options=options)


class Genai:
    """onnxruntime-genai, of its builder's folders and ours."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime
        import onnxruntime_genai

        self.og = onnxruntime_genai
        config = onnxruntime_genai.Config(str(path))
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)
        versions = {"onnxruntime-genai": onnxruntime_genai.__version__}
        self.about = versions | {"onnxruntime": onnxruntime.__version__}

    def generator(self, tokens: list[int], room: int) -> Any:
        """A generator that has read ``tokens``."""
        parameters = self.og.GeneratorParams(self.model)
        length = len(tokens) + room
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = self.og.Generator(self.model, parameters)
        generator.append_tokens(np.asarray(tokens, dtype=np.int32))
        return generator

    def read(self, tokens: list[int], room: int) -> int:
        """As of :class:`Model`."""
        self.running = self.generator(tokens, room)
        return self.step(-1)

    def step(self, token: int) -> int:
        """As of :class:`Model`; ``token`` is the one it gave before, which it has."""
        self.running.generate_next_token()
        return int(self.running.get_next_tokens()[0])

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """As of :class:`Model`."""
        found: NDArray[np.float32] = self.generator(tokens, 1).get_output("logits")[0]
        return found.astype(np.float32)


class OpenVino:
    """OpenVINO, of a model with states, as optimum-intel writes it."""

    def __init__(self, path: Path, threads: int) -> None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # does nothing but report
        import openvino

        wanted = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(path / "openvino_model.xml", "CPU", wanted)
        self.request = compiled.create_infer_request()
        self.inputs = {name for one in compiled.inputs for name in one.get_names()}
        chosen = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        settings = {name: str(compiled.get_property(name)) for name in chosen}
        self.about = {"openvino": openvino.__version__.partition("-")[0], **settings}
        self.length = 0

    def passed(self, tokens: list[int]) -> NDArray[np.float32]:
        """Logits [T, V] behind each of some more tokens."""
        self.length += len(tokens)
        given = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, self.length), dtype=np.int64),
            "position_ids": np.arange(self.length - len(tokens), self.length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self.request.infer({name: value for name, value in given.items() if name in self.inputs})
        found: NDArray[np.float32] = self.request.get_tensor("logits").data[0]
        return found

    def read(self, tokens: list[int], room: int) -> int:
        """As of :class:`Model`."""
        self.request.reset_state()
        self.length = 0
        return int(self.passed(tokens)[-1].argmax())

    def step(self, token: int) -> int:
        """As of :class:`Model`."""
        return int(self.passed([token])[-1].argmax())

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """As of :class:`Model`."""
        self.request.reset_state()
        self.length = 0
        return self.passed(tokens).copy()


class Ours:
    """A runtime of nirvana-deploy, by its name there."""

    def __init__(self, runtime: str, path: Path, threads: int) -> None:
        from importlib.metadata import version

        from nirvana_deploy.base.errors import NirvanaError
        from nirvana_deploy.runtime.registry import open_runner
        from nirvana_deploy.runtime.table import runtime_named

        try:
            self.runner = open_runner(path, runtime=runtime, threads=threads)
        except NirvanaError as error:
            sys.exit(error.message)  # the last line is what is told of it
        distribution = runtime_named(runtime).distribution
        self.about = {distribution: version(distribution).partition("-")[0]}
        self.state: Any = None

    def read(self, tokens: list[int], room: int) -> int:
        """As of :class:`Model`."""
        logits, self.state = self.runner.prefill(np.array([tokens], dtype=np.int64))
        return int(logits[0, -1].argmax())

    def step(self, token: int) -> int:
        """As of :class:`Model`."""
        logits, self.state = self.runner.decode(np.array([[token]], dtype=np.int64), self.state)
        return int(logits[0, -1].argmax())

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """As of :class:`Model`."""
        return self.runner.prefill(np.array([tokens], dtype=np.int64))[0][0]


KINDS: dict[str, Callable[[Path, int], Model]] = {
    "transformers": Transformers,
    "torch.compile": Compiled,
    "optimum-onnx": Optimum,
    "onnxruntime-genai": Genai,
    "openvino": OpenVino,
}
"""Runtime -> what opens a folder in it."""


def timed(model: Model, tokens: list[int], new_tokens: int) -> dict[str, Any]:
    """Milliseconds from a prompt to its first token, and between those that follow."""
    stamps = [time.perf_counter()]
    token = model.read(tokens, new_tokens)
    stamps.append(time.perf_counter())
    for _ in range(new_tokens - 1):
        token = model.step(token)
        stamps.append(time.perf_counter())
    first, *others = (1e3 * float(gap) for gap in np.diff(stamps))
    return {"ttft_ms": first, "itl_ms": others}


def write_logits(model: Model, windows: list[list[int]], file: Path) -> dict[str, Any]:
    """Logits of all windows, one behind the other."""
    with file.open("wb") as out:
        for window in windows:
            np.ascontiguousarray(model.logits(window[:-1]), dtype=np.float32).tofile(out)
    return {}


def peak_rss_bytes() -> int:
    """Of this program alone: what getrusage says begins with the peak of the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Load, then answer until the input ends."""
    kind, path, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what runtimes print is no answer

    def answer(record: dict[str, Any]) -> None:
        answers.write(json.dumps({**record, "peak_rss_bytes": peak_rss_bytes()}) + "\n")
        answers.flush()

    model = KINDS[kind](path, threads) if kind in KINDS else Ours(kind, path, threads)
    answer({"about": model.about})
    for line in sys.stdin:
        request = json.loads(line)
        if "windows" in request:
            answer(write_logits(model, request["windows"], Path(request["file"])))
        else:
            answer(timed(model, request["tokens"], request["new_tokens"]))


if __name__ == "__main__":
    main()
