"""The package without what Windows lacks: a stand-in, for there is no such machine here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders.scripts import ROOT

from nirvana_deploy.base.child import child_environment

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux, which says what is open"),
]

THEIRS = (
    *("click", "concurrent.futures.process", "huggingface_hub", "huggingface_hub.hf_file_system", "jinja2"),
    *(
        "matplotlib.pyplot",
        "multiprocessing",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxscript",
        "psutil",
        "rich",
    ),
    *("safetensors.torch", "tempfile", "torch", "transformers", "transformers.trainer", "uuid"),
)
"""What is imported before: it brings for each system what that system has."""
_BEGIN = """
import importlib, json, os, sys
from pathlib import Path
from builders import windows
windows.pretend(already=json.loads(sys.argv[1]))
"""
_STAND_IN = """
model, place = Path(sys.argv[2]), Path(sys.argv[3])
path = place / "file"
path.write_text("mine")
with path.open() as file:
    for forbidden in (path.unlink, lambda: path.replace(f"{path}-2"), lambda: os.open(place, os.O_RDONLY)):
        try:
            forbidden()
        except PermissionError:
            print("refused")
path.unlink()
"""
_IMPORTS = """
for name in windows.package_modules():
    importlib.import_module(name)
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.ownership.lock import FolderLock
with FolderLock(place):
    try:
        FolderLock(place)
    except NirvanaError as held:
        assert f"process {os.getpid()} (" in held.message, held
        print("held")
assert not list(place.iterdir())
FolderLock(place).release()
"""
_JOB = """
from builders.jobs import SHORT
from nirvana_deploy import prune_export, verify_folder
from nirvana_deploy.base.machine import cpu_seconds, peak_rss_bytes, system_cpu_seconds
from nirvana_deploy.model.checkpoint import load_tokenizer
from nirvana_deploy.model.text.chat import users_turn
out = place / 'out'
tokenizer = load_tokenizer(model)
tokenizer.chat_template = "{{ messages[0].content }}!"
print(users_turn(tokenizer, "Hi"))
options = {**SHORT, "num_sequences": 4, "seq_len": 16, "threads": 1, "run_benchmark": False}
prune_export(
    str(model), sparsity=0.3, out=out, quantize=("int8",), recover="64", recover_batch=2, **options
)
verify_folder(out).require_passed()
prune_export(str(model), sparsity=0.2, out=out, until="checkpoint", force=True, **options)
assert 0 < system_cpu_seconds() < cpu_seconds() and peak_rss_bytes() > 1 << 20
print("done")
"""


def test_a_model_goes_the_whole_way(tiny_llama: Path, tmp_path: Path) -> None:
    environment = child_environment()
    environment["PYTHONPATH"] += f":{ROOT / 'tests'}"
    script = _BEGIN + _STAND_IN + _IMPORTS + _JOB
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(THEIRS), str(tiny_llama), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.split() == [*3 * ["refused"], "held", "Hi!", "done"]


@pytest.mark.slow
def test_the_tests_are_collected() -> None:
    collect = """
import pytest
quiet = ["-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:hypothesispytest", "-W", "default"]
print(int(pytest.main(["--collect-only", "-q", "-s", *quiet])))
"""
    environment = child_environment()
    environment["PYTHONPATH"] += f":{ROOT / 'tests'}"
    theirs = json.dumps([*THEIRS, "hypothesis"])
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + collect, theirs],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("\n0\n"), done.stdout[-3000:] + done.stderr[-2000:]
