"""Damage to one file, at random: what stands there, its bytes, or what they mean in its format."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2.5, -0.0, 1e308, 10**40, 2**31, 2**63, 2**64, float("nan"), float("inf"),
    "", " ", "x" * 70_000, "\x00", "\x1b[2J", "../../etc/passwd", "/dev/zero", "nan", "\ud800", "<script>",
    [], {}, [[]], [None], {"": None}, [1, "2", None], {"a": {"b": {"c": []}}},
)  # fmt: skip
"""What no reader expects where it is put."""
_DEEP = 100_000
# fmt: off
_TOML = ("true", "-1", "1e400", "nan", "[]", '""', "{}", "[[1]]", "0x_", "1979-05-27", "'''", "1" + "0" * 30,
         "2.5", '"\\u0000"', "[" * 5000, '"' + "x" * 70_000 + '"', '"nirvana"')
# fmt: on


def damage(path: Path, random: Random) -> str:
    """Damage the file ``path``; returns how, in a few words."""
    if random.random() < 0.2:
        name = random.choice(sorted(_PLACES))
        _PLACES[name](path)
        return name
    by_format = _FORMATS.get(path.suffix)
    if by_format is None or random.random() < 0.25:
        return damage_bytes(path, random)
    return by_format(path, random)


def damage_bytes(path: Path, random: Random) -> str:
    """Change the bytes of a file, or remove it; returns how."""
    name = random.choice(["gone", *sorted(_BYTES)])
    if name == "gone":
        path.unlink()
    else:
        path.write_bytes(_BYTES[name](path.read_bytes(), random))
    return name


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(4 << 30)


_PLACES: dict[str, Callable[[Path], None]] = {
    "gone": Path.unlink,
    "empty": _emptied,
    "a folder": _folder,
    "a pipe": _pipe,
    "a dangling link": _dangling,
    "a link to itself": _circle,
    "a link to /dev/zero": _endless,
    "four GiB of nothing": _sparse,
}


def _flipped(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    reach = random.choice((64, 4096, len(data)))  # headers matter most
    for _ in range(random.choice((1, 1, 8, 64))):
        changed[random.randrange(min(reach, len(data)))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncated(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def _inserted(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + random.randbytes(random.choice((1, 8, 100))) + data[place:]


def _numbered(data: bytes, random: Random) -> bytes:
    """Eight bytes that may be a length become a huge one."""
    place = random.randrange(max(1, min(len(data), 4096) - 8))
    number = random.choice((2**31, 2**32, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
    return data[:place] + number + data[place + 8 :]


_BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "flipped bits": _flipped,
    "truncated": _truncated,
    "bytes more": _inserted,
    "huge lengths": _numbered,
    "noise": lambda data, random: random.randbytes(len(data)),
    "text of another kind": lambda data, random: random.choice((b"{}", b"[]", b"null", b"\xff\xfe")),
    "deep brackets": lambda data, random: b"[" * _DEEP + b"]" * _DEEP,
    "deep objects": lambda data, random: b'{"a":' * _DEEP + b"1" + b"}" * _DEEP,
}


def changed_json(value: Any, random: Random) -> tuple[Any, str]:
    """A JSON value with one node changed, and where."""
    place, node = "", value
    parent, key = None, None
    while isinstance(node, (dict, list)) and node and (parent is None or random.random() < 0.85):
        parent = node
        key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
        node, place = parent[key], f"{place}/{key}"
    if parent is None:
        return random.choice(VALUES), "/"
    way = random.random()
    if way < 0.15:
        del parent[key]
        return value, f"{place} gone"
    new: Any = random.choice(VALUES)
    if way < 0.4 and isinstance(node, (int, float)) and not isinstance(node, bool):
        new = random.choice((node + 1, node * 2, -node, node * 1000, float(node), str(node), [node]))
    elif way < 0.3 and isinstance(node, list):
        new = random.choice((node[1:], node * 2, node[::-1], dict.fromkeys(map(str, range(3)), node)))
    parent[key] = new
    return value, f"{place} = {str(new)[:40]!r}"


def _json(path: Path, random: Random) -> str:
    value, how = changed_json(json.loads(path.read_text()), random)
    path.write_text(json.dumps(value))
    return how


def _json_lines(path: Path, random: Random) -> str:
    lines = path.read_text().splitlines()
    number = random.randrange(len(lines))
    value, how = changed_json(json.loads(lines[number]), random)
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines))
    return f"line {number + 1}: {how}"


def _safetensors(path: Path, random: Random) -> str:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    value, how = changed_json(json.loads(data[8 : 8 + length]), random)
    header = json.dumps(value).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return f"header: {how}"


def _toml(path: Path, random: Random) -> str:
    lines = path.read_text().splitlines()
    places = [number for number, line in enumerate(lines) if re.match(r"[\w]+ = ", line)]
    number = random.choice(places)
    key = lines[number].partition(" = ")[0]
    texts = (*_TOML, f"1\n{key} = 2")
    lines[number] = f"{key} = {random.choice(texts)}"
    path.write_text("\n".join(lines))
    return lines[number][:60]


def _onnx(path: Path, random: Random) -> str:
    """A graph whose parts are changed, one at a time, and stay a protobuf."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    node = random.choice(graph.node)
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    tensor = random.choice(outside or list(graph.initializer))
    entry = random.choice(tensor.external_data) if tensor.external_data else None
    names = ["operator", "input", "output", "nodes", "dims", "type", "metadata", "opset", "inputs", "loop"]
    name = random.choice(names + ["location", "offset"] * (entry is not None))
    if name == "operator":
        node.op_type = random.choice(("", "Nothing", "Loop", "Add", "\x1b[2J"))
    elif name in ("input", "output"):
        names_of = getattr(node, name)
        names_of[random.randrange(len(names_of))] = random.choice(("", "nowhere", graph.node[0].output[0]))
    elif name == "nodes":
        del graph.node[random.randrange(len(graph.node)) :]
    elif name == "dims":
        tensor.dims[random.randrange(len(tensor.dims)) if tensor.dims else 0 :] = [
            random.choice((-1, 0, 7, 2**40))
        ]
    elif name == "type":
        tensor.data_type = random.choice((0, 1, 7, 8, 16, 999))
    elif name == "metadata":
        del model.metadata_props[:]
        model.metadata_props.add(key="nirvana_deploy.schema", value=random.choice(("9", "", "x" * 5000)))
    elif name == "opset":
        model.opset_import[0].version = random.choice((-1, 0, 1, 10**6))
    elif name == "inputs":
        del graph.input[random.randrange(len(graph.input))]
    elif name == "loop":
        node.input[0] = node.output[0]
    elif entry is not None:
        where = ("../llama/config.json", "/etc/passwd", "", "nowhere", "x" * 300)
        entry.value = random.choice(where if entry.key == "location" else ("-1", "1" * 30, "x", str(2**62)))
    path.write_bytes(model.SerializeToString())
    return f"{name} of {node.name or tensor.name}"


_FORMATS: dict[str, Callable[[Path, Random], str]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".safetensors": _safetensors,
    ".toml": _toml,
    ".onnx": _onnx,
}
