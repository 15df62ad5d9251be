from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
from builders.extras import needs
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nirvana_deploy.base.errors import MissingExtraError, NirvanaError
from nirvana_deploy.base.progress import SilentProgress
from nirvana_deploy.model import sources
from nirvana_deploy.model.gguf import convert as gguf_convert
from nirvana_deploy.model.gguf.convert import _CONVERSIONS, converted, find_converted
from nirvana_deploy.model.hub import ALLOWED_FILES, HubUnreachableError
from nirvana_deploy.model.sources import ALIASES, resolve_model

REVISION = "a" * 40


class Recorder(SilentProgress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the caches of the person who runs it."""
    monkeypatch.setenv("NIRVANA_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


# --- a hub on this machine ------------------------------------------------------------------------------


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the hub does: ``repositories`` maps an id to {file: bytes}, or to an error of the hub."""

    repositories: ClassVar[dict[str, dict[str, bytes] | tuple[int, str]]]
    gated_files: ClassVar[frozenset[str]]
    model_type = "llama"

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            found = self.repositories.get(f"{owner}/{name}", (404, "RepoNotFound"))
            if isinstance(found, tuple):
                return self.answer(found[0], {"X-Error-Code": found[1]})
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in found.items()
            ]
            info = {
                "id": f"{owner}/{name}",
                "sha": REVISION,
                "siblings": [{"rfilename": file} for file in found],
                "config": {"model_type": self.model_type},
                "cardData": {"license": "other", "license_name": "tiny-licence"},
            }
            return self.answer(
                200,
                {"Content-Type": "application/json"},
                json.dumps(entries if rest[:1] == ["tree"] else info),
            )
        owner, name, _, _, file = path.strip("/").split("/")
        if f"{owner}/{name}" in self.gated_files:
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        data = self.repositories[f"{owner}/{name}"][file]  # type: ignore[index]
        etag = hashlib.sha256(data).hexdigest()
        self.answer(200, {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION}, data)

    do_HEAD = do_GET  # noqa: N815 - http.server calls it by this name

    def answer(self, status: int, headers: dict[str, str], body: str | bytes = b"") -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Requests are not written to the terminal."""


@pytest.fixture
def hub(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}

    class Hub(FakeHub):
        repositories: ClassVar = {
            "org/good": {**files, "pytorch_model.bin": b"pickle", "original.pth": b"pickle"},
            "org/gated": files,
            "org/private-gated": (401, "GatedRepo"),
            "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
            "org/broken": (500, "InternalError"),
        }
        gated_files = frozenset({"org/gated"})

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        yield Hub
        server.shutdown()
        huggingface_hub.close_session()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that nobody listens at."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()


def test_hub_model_is_downloaded_without_its_pickles(hub: type[FakeHub], tiny_llama: Path) -> None:
    model = resolve_model("org/good")
    assert (model.name, model.origin, model.licence) == ("good", "hub org/good", "tiny-licence")
    assert (model.path / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
    assert (model.path / "tokenizer.json").is_file()
    assert not [path for path in model.path.iterdir() if path.suffix in (".bin", ".pth")]


def test_no_pattern_allows_pickle() -> None:
    pickles = ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl", "model.ckpt"]
    assert not list(huggingface_hub.utils.filter_repo_objects(pickles, allow_patterns=list(ALLOWED_FILES)))


def test_downloaded_model_is_found_when_the_hub_is_gone(
    hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_model("org/good")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model("org/good").path == first.path


@pytest.mark.parametrize("repository", ["org/gated", "org/private-gated"])
def test_gated_model_says_which_licence_and_login(hub: type[FakeHub], repository: str) -> None:
    with pytest.raises(NirvanaError, match="gated") as caught:
        resolve_model(repository)
    assert (
        caught.value.hint == f"Accept the licence at https://huggingface.co/{repository}, then: hf auth login"
    )


def test_model_that_the_hub_does_not_know(hub: type[FakeHub]) -> None:
    with pytest.raises(NirvanaError, match="no public model 'org/nothing'"):
        resolve_model("org/nothing")


def test_repository_without_safetensors_is_refused_before_download(
    hub: type[FakeHub], tmp_path: Path
) -> None:
    with pytest.raises(NirvanaError, match=r"no \*\.safetensors; it has: config.json, pytorch_model.bin"):
        resolve_model("org/pickled")
    assert not list((tmp_path / "hub").rglob("*.bin"))


def test_unsupported_architecture_is_refused_before_download(hub: type[FakeHub], tmp_path: Path) -> None:
    hub.model_type = "bert"
    with pytest.raises(NirvanaError, match=r"Unsupported: model_type 'bert', .* is an encoder"):
        resolve_model("org/good")
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


@pytest.mark.parametrize("repository", ["org/good", "org/broken"])
def test_unreachable_hub_names_the_cause(request: pytest.FixtureRequest, repository: str) -> None:
    request.getfixturevalue("hub" if repository == "org/broken" else "offline")
    with pytest.raises(HubUnreachableError, match=r"cannot be reached at http://127\.0\.0\.1"):
        resolve_model(repository)


def test_offline_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(HubUnreachableError, match="HF_HUB_OFFLINE is set"):
        resolve_model("org/good")


# --- names and folders ----------------------------------------------------------------------------------


def test_mistyped_alias_gets_did_you_mean() -> None:
    with pytest.raises(NirvanaError, match="Did you mean 'smollm2'"):
        resolve_model("smolm2")


def test_alias_of_an_unsupported_family_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sources.FAMILIES, "t5", raising=False)
    with pytest.raises(
        NirvanaError, match=r"'t5-small'.* family t5, which is not supported yet\. Supported: llama"
    ):
        resolve_model("t5-small")


@pytest.mark.parametrize("model", ["./nowhere", "a/b/c", "/nowhere/model", "some/model.gguf"])
def test_missing_path_never_reaches_the_hub(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://must.not.be.asked.invalid")
    with pytest.raises(NirvanaError, match="does not exist"):
        resolve_model(model)


def test_folder_resolves_to_itself(tiny_llama: Path) -> None:
    model = resolve_model(str(tiny_llama))
    assert (model.path, model.name, model.licence) == (tiny_llama.resolve(), tiny_llama.name, None)


def test_a_link_to_a_folder_is_called_what_the_link_is(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache's folder may have a hash for a name; what is made of it is called by what the user typed."""
    (tmp_path / "mine").symlink_to(tiny_llama)
    snapshot = tmp_path / "models--org--good" / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tiny_llama, snapshot)
    (tmp_path / "latest").symlink_to(snapshot)
    monkeypatch.chdir(tmp_path)
    found = resolve_model("./mine")
    assert (found.name, found.path) == ("mine", tiny_llama.resolve())
    assert resolve_model("./latest").name == "good"
    monkeypatch.chdir(tmp_path / "mine")
    assert resolve_model(".").name == tiny_llama.resolve().name


def test_folder_of_pickles_is_refused_with_the_command_that_converts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(NirvanaError, match="can run any code") as caught:
        resolve_model(str(tmp_path))
    assert "save_pretrained" in (caught.value.hint or "")
    with pytest.raises(NirvanaError, match=r"pytorch_model\.bin: pickle weights are refused"):
        resolve_model(str(tmp_path / "pytorch_model.bin"))


def test_folder_without_config_or_weights(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NirvanaError, match=r"no \*\.safetensors"):
        resolve_model(str(tmp_path))


def test_missing_shard_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "sharded")
    weight_map = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(NirvanaError, match=r"names model-2\.safetensors"):
        resolve_model(str(folder))


def test_weights_file_in_place_of_its_folder(tiny_llama: Path) -> None:
    with pytest.raises(NirvanaError, match="is a file") as caught:
        resolve_model(str(tiny_llama / "model.safetensors"))
    assert str(tiny_llama) in (caught.value.hint or "")


# --- GGUF -----------------------------------------------------------------------------------------------


def write_gguf(path: Path, folder: Path, *, architecture: str = "llama") -> Path:
    """Write the tiny Llama of ``folder`` as GGUF, the way llama.cpp lays it out, in fp32."""
    gguf = needs("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    tokens = {index: token for token, index in vocabulary.items()}
    last = config.vocab_size - 1
    tokens[last] = "Ġt"
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([tokens.get(index, f"<unused{index}>") for index in range(config.vocab_size)])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(*gguf_tensor(name, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensor(name: str, weight: np.ndarray, config: Any) -> tuple[str, np.ndarray]:
    """GGUF name and layout: rotary pairs of q and k interleave there and are halves in transformers."""
    gguf = needs("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    if heads:
        halves = weight.reshape(heads, 2, config.head_dim // 2, -1)
        weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
    return f"{names.get_name(name.removesuffix('.weight'))}.weight", weight


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as one GGUF file; read-only."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama)


def test_converted_gguf_equals_the_model_it_was_written_from(tiny_gguf: Path, tiny_llama: Path) -> None:
    model = resolve_model(str(tiny_gguf))
    assert (model.name, model.licence) == ("tiny", "apache-2.0")
    got, expected = load_file(model.path / "model.safetensors"), load_file(tiny_llama / "model.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    config = json.loads((model.path / "config.json").read_text())
    assert config["tie_word_embeddings"] and "quantization_config" not in config
    ids = AutoTokenizer.from_pretrained(model.path)("to")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(tiny_llama)("to")["input_ids"]


def test_conversion_happens_once_and_damage_is_repaired(tiny_gguf: Path) -> None:
    first, second, third = Recorder(), Recorder(), Recorder()
    folder = converted(tiny_gguf, progress=first).folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert converted(tiny_gguf, progress=second).folder == folder
    assert (len(first.notes), second.notes) == (1, [])

    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    converted(tiny_gguf, progress=third)
    assert len(third.notes) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.parametrize("lost", ["converted.json", "config.json"])
def test_incomplete_cache_entry_is_not_used(tiny_gguf: Path, lost: str) -> None:
    folder = converted(tiny_gguf).folder
    assert find_converted(folder.name) is not None
    (folder / lost).unlink()
    assert find_converted(folder.name) is None


def test_failed_conversion_leaves_nothing(
    tiny_gguf: Path, own_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, out: Path, progress: Any) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_convert, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted(tiny_gguf)
    assert not [path for path in own_caches.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kept_share", [0.001, 0.05, 0.5, 0.999])
def test_truncated_gguf(tiny_gguf: Path, tmp_path: Path, kept_share: float) -> None:
    data = tiny_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * kept_share)])
    with pytest.raises(NirvanaError, match="truncated or corrupted"):
        resolve_model(str(cut))


def test_gguf_with_a_list_longer_than_the_file(tmp_path: Path) -> None:
    """Whose entries gguf's own reader would make up, one by one, as many as it says."""
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 10, 1 << 20)
    (tmp_path / "long.gguf").write_bytes(header)
    with pytest.raises(NirvanaError, match=r"its 49 bytes hold, .*\(something in it ends at byte 57\)"):
        resolve_model(str(tmp_path / "long.gguf"))


def test_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "page.gguf").write_bytes(b"<html>not found</html>")
    with pytest.raises(NirvanaError, match=r"is not a GGUF file: it begins with b'<htm'"):
        resolve_model(str(tmp_path / "page.gguf"))


def test_gguf_of_an_unsupported_architecture(tiny_llama: Path, tmp_path: Path) -> None:
    falcon = write_gguf(tmp_path / "f.gguf", tiny_llama, architecture="falcon")
    with pytest.raises(NirvanaError, match=r"says 'falcon'\. Supported: gemma3, gemma3_text, granite"):
        resolve_model(str(falcon))


def test_gguf_without_the_extra_names_the_pip_command(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_convert, "find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=r"\[gguf\]"):
        resolve_model(str(tiny_gguf))


# --- the wheel behind smollm2 ---------------------------------------------------------------------------


@pytest.fixture
def wheel(
    tiny_gguf: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> sources.WheelModel:
    """Two small wheels on a package index that is a folder; the pins are those of the small files."""
    index, whole = tmp_path / "index", tiny_gguf.read_bytes()
    index.mkdir()
    wheels = []
    for name, part in (("tiny_llm", whole[:999]), ("tiny_llm_more", whole[999:])):
        file, metadata = index / f"{name}-0.1-py3-none-any.whl", f"{name}-0.1.dist-info"
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{name}/tiny.gguf", part)
            archive.writestr(f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
            archive.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{metadata}/RECORD", "")
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        wheels.append(sources.Wheel(f"{name.replace('_', '-')}==0.1", sha256, f"{name}/tiny.gguf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    pinned = sources.WheelModel(tuple(wheels), "tiny.gguf", hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(sources._WHEELS, "smollm2", pinned)
    return pinned


def with_other(wheel: sources.WheelModel, **changes: str) -> sources.WheelModel:
    """The model with another last wheel."""
    return replace(wheel, wheels=(*wheel.wheels[:-1], replace(wheel.wheels[-1], **changes)))


def test_default_model_falls_back_to_the_wheel_and_then_to_the_cache(
    wheel: sources.WheelModel, own_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve_model("smollm2")
    assert model.origin == "alias smollm2 -> pypi tiny-llm==0.1 and 1 more (tiny.gguf)"
    assert (model.name, model.licence) == ("smollm2", ALIASES["smollm2"].licence)
    assert model.path == own_caches / _CONVERSIONS / wheel.gguf_sha256
    assert {path.name for path in own_caches.iterdir()} == {_CONVERSIONS}
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    assert resolve_model("smollm2") == model


@pytest.mark.parametrize("pin", ["sha256 of a wheel", "sha256 of the file"])
def test_wheel_that_is_not_the_pinned_one_is_refused(
    wheel: sources.WheelModel, pin: str, own_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_other(wheel, sha256="0" * 64)
    if pin == "sha256 of the file":
        other = replace(wheel, gguf_sha256="0" * 64)
    monkeypatch.setitem(sources._WHEELS, "smollm2", other)
    with pytest.raises(NirvanaError, match="was not used: its sha256 is"):
        resolve_model("smollm2")
    assert not [path for path in own_caches.rglob("*") if path.is_file()]


def test_neither_hub_nor_index(wheel: sources.WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources._WHEELS, "smollm2", with_other(wheel, requirement="tiny-llm-more==9.9"))
    with pytest.raises(
        NirvanaError, match=r"(?s)hub cannot be reached.*pip could not download tiny-llm-more==9\.9"
    ):
        resolve_model("smollm2")


def test_python_without_pip(wheel: sources.WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(NirvanaError, match="has no pip") as caught:
        resolve_model("smollm2")
    assert "ensurepip" in (caught.value.hint or "")


def test_pins_are_well_formed() -> None:
    for model in sources._WHEELS.values():
        for digest in (model.gguf_sha256, *(wheel.sha256 for wheel in model.wheels)):
            assert len(digest) == 64 and int(digest, 16)


def test_terms_of_use_are_shown(wheel: sources.WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources._WHEELS, "gemma3-270m", wheel)
    notes = Recorder()
    resolve_model("gemma3-270m", progress=notes)
    assert "Gemma Terms of Use apply" in notes.notes[-1] and "https://" in notes.notes[-1]


# --- the command ----------------------------------------------------------------------------------------


def test_models_lists_every_alias_and_derives_support(monkeypatch: pytest.MonkeyPatch) -> None:
    from nirvana_deploy.cli.models import models

    found = json.loads(CliRunner().invoke(models, ["--json"]).stdout)
    rows, families = found["models"], {row["family"]: row for row in found["families"]}
    assert set(families) == set(sources.FAMILIES)
    assert families["llama"]["tried_on"] == "real" and families["smollm3"]["tried_on"] == "random"
    assert families["olmo2"]["removes"] == ["FFN neurons"] and families["t5"]["gguf"] is None
    assert {row["alias"]: row["supported"] for row in rows} == {n: a.supported for n, a in ALIASES.items()}
    assert ALIASES["qwen3-0.6b"].supported
    monkeypatch.delitem(sources.FAMILIES, "t5", raising=False)
    assert not ALIASES["t5-small"].supported
    table = CliRunner().invoke(models).stdout
    assert any(line.split()[:2] == ["olmo2", "FFN"] for line in table.splitlines())
    line = next(line for line in table.splitlines() if "t5-small" in line)
    assert line.split() == [
        "t5-small",
        "google-t5/t5-small",
        "60.5M",
        "Apache-2.0,",
        "not",
        "supported",
        "yet",
    ]
