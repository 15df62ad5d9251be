"""Facts about a result: what a report that travels may show."""

from __future__ import annotations

import pytest

from nirvana_deploy.output.records import Records
from nirvana_deploy.report.facts import details, without_folders


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("nirvana-deploy prune-export ./m --out out/a", "nirvana-deploy prune-export ./m --out out/a"),
        (
            "nirvana-deploy export owner/name --out '/home/me/my models/m'",
            "nirvana-deploy export owner/name --out m",
        ),
        (
            "n p /home/me/m/ --out=/srv/x --calib code:0.3,/home/me/text.txt:0.7",
            "n p m --out=x --calib code:0.3,text.txt:0.7",
        ),
        ("n p '~me/a b'", "n p 'a b'"),
        ("n p '/home/unfinished", "n p unfinished"),
    ],
)
def test_a_command_keeps_the_last_name_of_absolute_paths(command: str, shown: str) -> None:
    assert without_folders(command) == shown


@pytest.mark.parametrize(
    ("origin", "shown"),
    [
        ("folder /home/me/my model", "folder my model"),
        ("gguf /home/me/m.Q4_K_M.gguf", "gguf m.Q4_K_M.gguf"),
        ("alias smollm2 -> hub HuggingFaceTB/SmolLM2-135M-Instruct",) * 2,
    ],
)
def test_an_origin_names_no_folder_of_this_machine(origin: str, shown: str) -> None:
    manifest = {"model": {"name": "m", "origin": origin}, "command": "nirvana-deploy prune /home/me/m"}
    facts = dict(dict(details(Records(manifest, None, None)))["Origin"])
    assert (facts["Origin"], facts["Command"]) == (shown, "nirvana-deploy prune m")
