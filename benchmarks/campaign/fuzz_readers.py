"""Coverage-guided fuzzing of the readers of foreign bytes, by atheris: they read, or raise a NirvanaError.

    python benchmarks/campaign/fuzz_readers.py READER [FOLDER OF INPUTS ...] [-max_total_time=60] [-runs=N]

The options behind READER are libFuzzer's. An input that raises anything else is written to a file crash-*,
which repeats it when it is given in place of the folder. ``make fuzz`` installs atheris and runs each reader
for a minute.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import atheris  # noqa: E402
import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402

with atheris.instrument_imports(include=["nirvana_deploy", "gguf", "tomllib"]):
    import gguf

    from nirvana_deploy.base.errors import NirvanaError
    from nirvana_deploy.base.reading import read_json, read_tensors, read_toml
    from nirvana_deploy.model.gguf.convert import read_header
    from nirvana_deploy.model.weight_files import file_by_tensor
    from nirvana_deploy.model.weights import SafetensorsWeights
    from nirvana_deploy.pipeline.recipe_file import read_recipe
    from nirvana_deploy.prune.plan_file import read_plan

_FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def _weights(file: Path) -> None:
    weights = SafetensorsWeights(file.parent)
    for name in weights.names():
        weights.shape(name)
        weights.dtype(name)
        weights.load(name)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "gguf": ("model.gguf", read_header),
    "weights": ("model.safetensors", _weights),
    "index": ("model.safetensors.index.json", file_by_tensor),
    "tensors": ("scores.safetensors", read_tensors),
    "json": ("record.json", read_json),
    "toml": ("recipe.toml", read_toml),
    "recipe": ("recipe.toml", read_recipe),
    "plan": ("plan.json", read_plan),
}
"""Reader -> the name of the file that it gets, and the function."""


def _examples(folder: Path) -> None:
    """Small whole files, to begin with."""
    tensors = safetensors.numpy.save({"a": np.zeros(2, np.float32)}, {"format": "pt"})
    (folder / "tensors").write_bytes(tensors)
    index = {"metadata": {"total_size": 8}, "weight_map": {"a": "model.safetensors"}}
    (folder / "json").write_text(json.dumps(index))
    (folder / "toml").write_text('schema = 1\nmodel = "llama"\n\n[pruning]\nsparsity = 0.3\n')
    writer = gguf.GGUFWriter(folder / "gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("a", np.zeros(2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Fuzz the reader that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"{__doc__}\nREADER is one of {', '.join(READERS)}.")
    name, read = READERS[sys.argv.pop(1)]
    if not any(not word.startswith("-") for word in sys.argv[1:]):
        examples = _FOLDER / "examples"
        examples.mkdir()
        _examples(examples)
        sys.argv.append(str(examples))
    file = _FOLDER / name

    def once(data: bytes) -> None:
        file.write_bytes(data)
        with suppress(NirvanaError):
            read(file)

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
