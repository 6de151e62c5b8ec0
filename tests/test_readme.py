"""README, docs/ and the manual pages: their examples work, and they name every setting and every command that there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from qemu_userns.host.config import load_config
from qemu_userns.host.settings import CHOICES, TYPES
from tests.conftest import CHECKOUT, dropin_folder

if TYPE_CHECKING:
    from pathlib import Path

README = (CHECKOUT / "README.md").read_text()
DOCS = CHECKOUT / "docs"
MAN_1, MAN_5 = DOCS / "qemu-userns.1", DOCS / "qemu-userns-config.5"
PAGES = {page: page.read_text() for page in (CHECKOUT / "README.md", *sorted(DOCS.glob("*.md")))}

EXAMPLES = re.findall(r"^```sh test\n(.*?)^```$", "\n".join(PAGES.values()), re.MULTILINE | re.DOTALL)
TOML_EXAMPLES = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def usage() -> str:
    program = "from qemu_userns.cli.main import main; main()"
    command = [sys.executable, "-c", program, "--help"]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=CHECKOUT).stdout


def commands() -> list[str]:
    return re.findall(r"^(?:usage:| +) qemu-userns ([a-z]+)", usage(), re.MULTILINE)


def unroff(text: str) -> str:
    """Take the marks out of a manual page: fonts, escaped hyphens, macros that only set a font."""
    text = re.sub(r"\\f.|\\c|\\&", "", text).replace("\\-", "-")
    return re.sub(r"^\.(?:[BIR]{1,2}|TP|SY) ?", "", text, flags=re.MULTILINE)


@pytest.mark.qemu
@pytest.mark.dropin
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.split("\n")[0][:60])
def test_examples_work(example: str, tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    for name in ("vmlinuz", "initrd.img"):
        (tmp_path / name).touch()
    disk = ["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "disk.qcow2"), "1M"]
    subprocess.run(disk, check=True)
    path = f"{dropin_folder()}:{dropin_folder().parent / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "XDG_CONFIG_HOME": str(tmp_path / "config")}
    done = subprocess.run(["sh", "-euc", example], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout, "it says nothing"


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
    assert len(TOML_EXAMPLES) == 1


@pytest.mark.parametrize("example", TOML_EXAMPLES)
def test_configuration_example_is_valid(example: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(example)
    config = load_config([str(file)], None)
    assert config.require == ("landlock",)
    assert len(config.idmap) == 1
    assert len(config.qemu) == 1


def test_manual_example_is_valid(tmp_path: Path) -> None:
    example = MAN_5.read_text().split(".EX\n")[1].split(".EE")[0]
    file = tmp_path / "config.toml"
    file.write_text(unroff(example))
    assert len(load_config([str(file)], None).idmap) == 2


@pytest.mark.parametrize("key", sorted(TYPES))
def test_every_setting_is_described(key: str) -> None:
    assert f"| `{key}` |" in README
    assert re.search(rf"^\.TP\n\.B {re.escape(key)}$", MAN_5.read_text(), re.MULTILINE)


def test_no_other_setting_is_described() -> None:
    rows = README.split("## Configuration", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"^\| `([a-z.]+)` \|", rows, re.MULTILINE)) == set(TYPES)
    page = re.sub(r"^\.RS\n.*?^\.RE\n", "", MAN_5.read_text(), flags=re.MULTILINE | re.DOTALL)  # keys of a setting's own table
    assert set(re.findall(r"^\.TP\n\.B ([a-z.]+)$", page, re.MULTILINE)) == set(TYPES)


@pytest.mark.parametrize(("key", "choice"), [(key, choice) for key, choices in CHOICES.items() for choice in choices])
def test_every_choice_is_described(key: str, choice: str) -> None:
    assert any(f"`{choice}`" in line for line in README.splitlines() if line.startswith(f"| `{key}` |"))
    assert re.search(rf"\\\(lq ?{choice} \\\(rq", MAN_5.read_text())


def test_usage_names_commands() -> None:
    assert {"run", "explain", "install"} <= set(commands())


@pytest.mark.parametrize("command", [*commands(), "--version", "--help"])
def test_every_command_is_described(command: str) -> None:
    assert f"qemu-userns {command}" in README
    page = unroff(MAN_1.read_text()).split("\nSH COMMANDS", 1)[-1]
    assert re.search(rf"^{command}\b", page, re.MULTILINE)


def test_every_setting_is_in_the_usage() -> None:
    assert set(re.findall(r"(\w+)=", usage().split("KEY=VALUE:", 1)[1])) <= set(TYPES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", PAGES[page]):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        assert not anchor or anchor in find_anchors(PAGES[found]), f"{target}#{anchor}"


def find_anchors(text: str) -> set[str]:
    """Return the anchors that a page's headings have."""
    titles = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == DOCS], ids=lambda page: page.name)
def test_readme_leads_to_every_page(page: Path) -> None:
    assert f"](docs/{page.name})" in README


def test_scripts_are_there() -> None:
    for name in re.findall(r"scripts/[a-z]+", "\n".join(PAGES.values())):
        assert os.access(CHECKOUT / name, os.X_OK), name


@pytest.mark.parametrize("page", [MAN_1, MAN_5], ids=lambda page: page.name)
def test_manual_pages_are_well_formed(page: Path) -> None:
    text = page.read_text()
    assert re.match(r'(\.\\".*\n)*\.TH [A-Z-]+ [15] ', text)
    assert text.count("\n.EX\n") == text.count("\n.EE\n")
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", "-z", str(page)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
