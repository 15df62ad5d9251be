"""The decoder of an encoder-decoder in the form that an engine can have.

The exported decoder serves the first step and all later ones, told apart by ``use_cache_branch`` [1] (bool):
the keys and values of the cross-attention are computed from ``encoder_hidden_states[:, taken:]``, where
``taken`` is the length of their cache, times that input. TensorRT refuses it: a value that decides a length
must be an integer, and this one is a bool. It is also not needed where an empty cache can be passed, as an
engine's profiles allow: the cache is empty in the first step and whole in all others, so its length alone
says it.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from nirvana_deploy.base.artifact import write_bytes
from nirvana_deploy.base.errors import NirvanaError

BRANCH = "use_cache_branch"


def drop_cache_branch(path: Path) -> None:
    """Rewrite the decoder ``path`` without ``use_cache_branch``: the length of the cache decides.

    Its external data stays as it is. A graph without that input is left alone; raises NirvanaError for one
    that uses it in another way than this tool's exporter.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    if all(value.name != BRANCH for value in graph.input):
        return
    readers = [node for node in graph.node if BRANCH in node.input]
    casts = {node.output[0]: node for node in readers if node.op_type == "Cast"}
    products = [node for node in graph.node if node.op_type == "Mul" and set(node.input) & set(casts)]
    reads_of_casts = sum(name in casts for node in graph.node for name in node.input)
    if len(casts) != len(readers) or reads_of_casts != len(products) or not products:
        raise NirvanaError(
            f"{path}: {BRANCH} is used otherwise than in this tool's export, and an engine cannot have it.",
            hint="Export the model again: nirvana-deploy export CHECKPOINT --out DIR --dtype fp16",
        )
    renamed = {node.output[0]: next(name for name in node.input if name not in casts) for node in products}
    for node in [*products, *casts.values()]:
        graph.node.remove(node)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    kept = [value for value in graph.input if value.name != BRANCH]
    del graph.input[:]
    graph.input.extend(kept)
    write_bytes(path, model.SerializeToString())
