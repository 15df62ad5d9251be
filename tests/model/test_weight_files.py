"""Both halves of the tool, and whatever else loads the folder, read the same safetensors, or none does."""

from __future__ import annotations

import ast
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.extras import needs
from builders.plans import logits_of
from builders.scripts import ROOT
from builders.tiny import write_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.sources import resolve_model

OPENERS = [lambda folder: Checkpoint.open(folder), lambda folder: resolve_model(str(folder))]


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model of 'mine' $(touch owned)")


def add_pickle(folder: Path) -> None:
    """Other weights, as a pickle under the name that transformers reads when it finds no safetensors."""
    tensors = load_file(folder / "model.safetensors")
    torch.save(
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "pytorch_model.bin"
    )


@pytest.mark.parametrize("opened", OPENERS)
def test_an_unknown_name_beside_a_pickle_is_refused_with_the_command(opened: object, folder: Path) -> None:
    add_pickle(folder)
    before = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(NirvanaError, match=r"would load pytorch_model\.bin in its place") as refused:
        opened(folder)  # type: ignore[operator]
    assert "has weights in weights.safetensors, which transformers does not read" in refused.value.message
    command = (refused.value.hint or "").removeprefix("If it holds the model: ")
    subprocess.run(shlex.split(command), check=True)
    weights = Checkpoint.open(resolve_model(str(folder)).path).weights
    assert all(torch.equal(weights.load(name), tensor) for name, tensor in before.items())


def test_several_unknown_names_are_merged_by_the_command_of_the_message(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for part, held in (("one", names[:5]), ("two", names[5:])):
        save_file({name: tensors[name] for name in held}, folder / f"{part}.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(NirvanaError, match=r"one\.safetensors, two\.safetensors") as refused:
        Checkpoint.open(folder)
    _, _, command = (refused.value.hint or "").partition("merge them: ")
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    assert set(Checkpoint.open(folder).weights.names()) == set(names)


def test_a_pickle_beside_safetensors_is_never_read(folder: Path) -> None:
    add_pickle(folder)
    checkpoint = Checkpoint.open(folder)
    for name, parameter in checkpoint.load().named_parameters():
        assert torch.equal(parameter, checkpoint.weights.load(name)) and parameter.any()


@pytest.mark.parametrize("opened", OPENERS)
def test_pickles_alone_are_refused_by_name(opened: object, folder: Path) -> None:
    add_pickle(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(NirvanaError, match=r"pytorch_model\.bin: pickle weights are refused") as refused:
        opened(folder)  # type: ignore[operator]
    _, _, command = (refused.value.hint or "").partition("convert once: ")
    python, flag, code = shlex.split(command.partition(" (and copy")[0])
    assert (python, flag) == ("python", "-c") and f"{str(folder)!r}" in code and "save_pretrained" in code


def test_a_single_file_wins_over_an_index_in_both_halves(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama-tied", max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    ours = Checkpoint.open(folder).weights
    for name, parameter in AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True
    ).named_parameters():
        assert torch.equal(ours.load(name), parameter) and torch.equal(parameter, changed[name])


def sharded(folder: Path) -> Path:
    """The index of a model in several shards."""
    write_tiny(folder, "llama-tied", max_shard_size="50KB")
    return folder / "model.safetensors.index.json"


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """transformers takes every tensor of every shard, whatever the index says."""
    index = sharded(tmp_path)
    weight_map = read_json(index)["weight_map"]
    first, *_, last = sorted(set(weight_map.values()))
    name = next(name for name, shard in weight_map.items() if shard == first)
    tensors = load_file(tmp_path / last)
    other = load_file(tmp_path / first)[name] + 1
    save_file(tensors | {name: other}, tmp_path / last, {"format": "pt"})
    theirs = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())[name]
    assert torch.equal(theirs, other)
    with pytest.raises(NirvanaError, match=f"holds '{name}', which model.safetensors.index.json places in"):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_the_index_does_not_know_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    written = read_json(index)
    del written["weight_map"]["model.norm.weight"]
    write_json(index, written)
    with pytest.raises(NirvanaError, match=r"holds 'model\.norm\.weight', which .* places in no file"):
        Checkpoint.open(tmp_path)


def test_a_tensor_mapped_to_another_shard_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    written = read_json(index)
    first = min(written["weight_map"].values())
    written["weight_map"]["model.norm.weight"] = first
    write_json(index, written)
    with pytest.raises(NirvanaError, match=f"places 'model.norm.weight' in {first}, which does not hold it"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors"])
def test_a_file_of_another_name_beside_the_model_is_read_by_nobody(name: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
    ours = Checkpoint.open(folder).weights
    for key, parameter in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        assert torch.equal(ours.load(key), parameter) and torch.equal(parameter, tensors[key])


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path).unlink()
    with pytest.raises(NirvanaError, match="which transformers does not read"):
        Checkpoint.open(tmp_path)


def test_a_config_that_sends_transformers_elsewhere_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | {"transformers_weights": "other.safetensors"})
    with pytest.raises(NirvanaError, match=r"transformers_weights = 'other\.safetensors'"):
        Checkpoint.open(folder)


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "owner/name"}'
    )
    with pytest.raises(NirvanaError, match=r"holds an adapter \(adapter_config\.json\) for 'owner/name'"):
        Checkpoint.open(folder)


def test_an_adapter_alone_names_its_model_and_the_command_that_merges(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "owner/name"})
    with pytest.raises(NirvanaError, match=r"holds an adapter .* for 'owner/name'") as refused:
        resolve_model(str(tmp_path))
    assert "merge_and_unload().save_pretrained" in (refused.value.hint or "")


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', "{}", "7"])
def test_an_index_of_another_form_is_named(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(NirvanaError, match=r"index\.json is not a checkpoint index"):
        resolve_model(str(folder))


def test_every_model_that_transformers_loads_is_safetensors_or_gguf() -> None:
    """Tokenizers and configurations hold no weights."""
    loading = [
        (path.name, {keyword.arg for keyword in node.keywords})
        for path in ROOT.glob("nirvana_deploy/**/*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(".from_pretrained")
        and not ast.unparse(node.func).startswith(("AutoTokenizer", "AutoConfig", "GenerationConfig"))
    ]
    assert loading and all(keywords & {"use_safetensors", "gguf_file"} for _, keywords in loading)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft of transformers
def test_the_command_that_merges_an_adapter_gives_the_model_with_it(tmp_path: Path) -> None:
    peft = needs("peft")
    base = write_tiny(tmp_path / "base", "llama-tied")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NirvanaError) as refused:
        resolve_model(str(tmp_path / "adapter"))
    words = shlex.split((refused.value.hint or "").partition("install peft, ")[2].partition(", then")[0])
    assert words[:2] == ["python", "-c"]
    exec(words[2])
    tokens = np.arange(5, 25)[None]
    wanted = adapted(input_ids=torch.from_numpy(tokens)).logits.detach()
    merged = Checkpoint.open(tmp_path / "adapter-merged")
    torch.testing.assert_close(logits_of(merged.path, tokens), wanted, rtol=1e-4, atol=1e-4)
    assert merged.tokenizer("one")["input_ids"]
