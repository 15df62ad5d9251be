"""A Triton model of text from the two engines of an encoder-decoder.

```
REPOSITORY/NAME/config.pbtxt    Python backend, decoupled, text in and out
REPOSITORY/NAME/1/model.py      the loop (triton_seq2seq_decode.py of this package), on TensorRTSeq2Seq
REPOSITORY/NAME/1/engine/       both engines with their records, config.json, the tokenizer
```

One pass of the decoder needs the encoder's states and two kinds of cache, so a client of bare plans would
have to be a runner itself; here the runner serves. It opens engines of ``tensorrt`` and ``tensorrt-rtx``
alike, but the Python that Triton starts must have this package. **No Triton server has loaded one of these
yet**: the configuration is checked against Triton's schema, the loop is run on a fake driver.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from nirvana_deploy.base.artifact import require_free_bytes
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.package import triton_seq2seq_decode
from nirvana_deploy.package.triton import (
    TritonModel,
    TritonRepository,
    TritonTensor,
    require_name,
    write_repository,
)
from nirvana_deploy.runtime.tensorrt.encoder_decoder import config_folder
from nirvana_deploy.runtime.tensorrt.record import ENCODER, engine_files, read_engine_record, record_path

ENGINE_FOLDER = "engine"
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "spiece.model")


def triton_from_seq2seq_engines(
    decoder: Path, tokenizer: Path, out: Path, *, name: str, progress: Progress = SILENT
) -> TritonRepository:
    """Write the repository ``out`` for ``decoder`` and the encoder's engine beside it; whole or not at all.

    ``tokenizer`` is the folder of the tokenizer's files. Raises NirvanaError for the encoder's engine in the
    place of the decoder's, for one that is damaged or without weights, where no config.json nearby names the
    first token, for a name that Triton's URLs cannot hold, or a disk without room.
    """
    require_name(name)
    record = read_engine_record(decoder)
    if record.part == ENCODER:
        raise NirvanaError(
            f"{decoder} is the encoder of an encoder-decoder, which is served by its decoder.",
            hint="Name the decoder's engine: --engine NAME-decoder.engine",
        )
    engines = engine_files(decoder)
    records = [read_engine_record(engine) for engine in engines]
    for engine, one in zip(engines, records, strict=True):
        if one.stripped:
            raise NirvanaError(f"{engine} holds no weights; nothing refits it in Triton.")
    config = config_folder(decoder) / "config.json"
    texts = sorted({path for pattern in _TOKENIZER_FILES for path in tokenizer.glob(pattern)})
    files = [*(path for engine in engines for path in (engine, record_path(engine))), config, *texts]
    require_free_bytes(out, sum(path.stat().st_size for path in files), what="The Triton repository")

    def place(version: Path) -> None:
        shutil.copyfile(triton_seq2seq_decode.__file__, version / "model.py")
        (version / ENGINE_FOLDER).mkdir()
        with progress.task("Copying engines", len(files)) as advance:
            for path in files:
                shutil.copyfile(path, version / ENGINE_FOLDER / path.name)
                advance(1)

    model = TritonModel(
        name=name,
        backend="python",
        inputs=[
            TritonTensor("text_input", "TYPE_STRING", (1,)),
            TritonTensor("max_tokens", "TYPE_INT32", (1,), optional=True),
            TritonTensor("stream", "TYPE_BOOL", (1,), optional=True),
        ],
        outputs=[
            TritonTensor("text_output", "TYPE_STRING", (1,)),
            TritonTensor("token_ids", "TYPE_INT32", (-1,)),
        ],
        place=place,
        decoupled=True,
        parameters=(("decoder", f"{ENGINE_FOLDER}/{decoder.name}"),),
        kind="KIND_GPU",
    )
    return write_repository(out, [model])
