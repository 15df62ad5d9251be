"""What a model's folder says to people travels with its weights, whatever hands wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nirvana_deploy.model.text.source_card import legal_files, source_card


def card(folder: Path, front_matter: str) -> Path:
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# A model\n", encoding="utf-8")
    return folder


def test_licence_languages_and_base_are_read_and_nothing_else(tmp_path: Path) -> None:
    card(
        tmp_path,
        "license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [en, fr]\n"
        "base_model: owner/name\ntags: [x]\nwidget: {text: hello}",
    )
    assert source_card(tmp_path) == {
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "language": ["en", "fr"],
        "base_model": "owner/name",
    }


@pytest.mark.parametrize(
    "front_matter",
    [
        "license: [",
        "- a list",
        "license: 3\nlanguage: {en: 1}\nbase_model: ['']",
        f"license: {'x' * 300}",
        'license: "two\\nlines"',
        "license: !!python/object/apply:os.system ['true']",
        "[" * 3000 + "]" * 3000,
    ],
    ids=["broken", "list", "types", "long", "lines", "object", "deep"],
)
def test_a_card_of_no_use_says_nothing(tmp_path: Path, front_matter: str) -> None:
    assert source_card(card(tmp_path, front_matter)) == {}


def test_a_folder_without_a_card_and_one_that_is_no_text_say_nothing(tmp_path: Path) -> None:
    assert source_card(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert source_card(tmp_path) == {}


def test_legal_files_are_those_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    wanted = ("LICENSE.txt", "Notice", "USE_POLICY.md", "licence")
    for name in (*wanted, "license.py", "README.md", "NOTICE.exe"):
        (folder / name).write_text(name, encoding="utf-8")
    (folder / "LICENSES").mkdir()
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (folder / "LICENSE-elsewhere").symlink_to(tmp_path / "secret")
    with (folder / "LICENSE-huge.txt").open("wb") as file:
        file.truncate(2 << 20)
    assert {file.name for file in legal_files(folder)} == set(wanted)
