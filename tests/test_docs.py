"""The documentation is true: its Python blocks run, its links resolve, and it names everything that is public."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import operator
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from support.models import byte_tokenizer, llama
from transformers import BertConfig, BertForSequenceClassification

import reparam_peft
from reparam_peft.cli.app import app

ROOT = Path(__file__).parents[1]
PACKAGE = Path(reparam_peft.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARKS = ROOT / "tests" / "benchmarks" / "README.md"
MARKDOWN = [*PAGES, ROOT / "CHANGELOG.md", BENCHMARKS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def relative(path: Path) -> str:
    """A test id."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """Fenced blocks of a language, each after as many empty lines as make its line numbers those of the page."""
    text = path.read_text(encoding="utf-8")
    found = (match for match in FENCE.finditer(text) if match[1] == language)
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in found]


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory in which the models of README are folders, the first with matrices that rank 64 makes smaller."""
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained("bert-base-uncased")
    llama(vocab_size=259).save_pretrained("HuggingFaceTB/SmolLM2-135M")
    byte_tokenizer().save_pretrained("HuggingFaceTB/SmolLM2-135M")
    Path("calibration.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50, encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=relative)
@pytest.mark.usefixtures("stand_ins")
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": relative(page)}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_readme_example_has_six_lines() -> None:
    lines = blocks(ROOT / "README.md", "python")[0].split("\n")
    assert len([line for line in lines if line]) == 6


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = (block.strip() for block in blocks(ROOT / "README.md", "bash") if "pytest" in block)
    assert "\n" not in command
    script = ROOT / ".ci" / "run"
    assert script.read_text(encoding="utf-8").splitlines()[-1] == command
    assert os.access(script, os.X_OK)


def test_config_page_is_generated() -> None:
    spec = importlib.util.spec_from_file_location("generate_config", ROOT / "docs" / "generate_config.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    committed = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert committed == generator.page(), "run: python docs/generate_config.py > docs/config.md"


@pytest.mark.parametrize("name", reparam_peft.__all__)
def test_api_page_has_public_name_and_its_parameters(name: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    section = re.search(rf"^### `{name}`$(.*?)(?=^##? |^### |\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, f"docs/api.md has no section on {name}"
    made_of_docstrings = f"\n::: reparam_peft.{name}\n" in section[1]
    assert made_of_docstrings or name in ("ReparamConfig", "ReparamModel")  # which have much that is PEFT's
    value = getattr(reparam_peft, name)
    if inspect.isfunction(value):
        assert [p for p in inspect.signature(value).parameters if f"\n    {p}: " not in inspect.getdoc(value)] == []


def command_options() -> Iterator[tuple[str, str]]:
    """The command line's options, with the command."""
    for command_name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            for option in [*parameter.opts, *parameter.secondary_opts]:
                if option.startswith("--") and option not in ("--help", "--install-completion", "--show-completion"):
                    yield command_name, option


def test_quickstart_has_every_command_and_option() -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    missing = [(command, option) for command, option in command_options() if f"`{option}`" not in text]
    assert missing == []
    assert {command for command, _ in command_options() if f"reparam {command} " not in text} == set()


def test_readme_has_every_package_and_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    packages = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert packages
    assert [name for name in packages if f"\n  {name}/ " not in text] == []
    links = re.findall(r"\]\((docs/[^)#]+)", text)
    assert {relative(page) for page in PAGES if page.parent.name == "docs"} == set(links)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) < 6000


def test_table_of_benchmarks_has_every_script() -> None:
    text = BENCHMARKS.read_text(encoding="utf-8")
    assert [script.name for script in BENCHMARKS.parent.glob("*.py") if f"\n| `{script.name}` |" not in text] == []


@pytest.mark.parametrize("page", MARKDOWN, ids=relative)
def test_files_and_names_of_the_text_exist(page: Path) -> None:
    """`config/fields.py`, from the root or the package on, and `config/fields.py: METHODS`."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    missing = []
    for file, name in re.findall(r"`((?:[\w.]+/)+[\w.]+\.py|[\w.]+\.py(?=: ))(?:: ([\w.]+))?`", text):
        if not any((folder / file).is_file() for folder in (ROOT, PACKAGE.parent, PACKAGE)):
            missing.append(file)
        elif name:
            module = importlib.import_module(f"reparam_peft.{file.removesuffix('.py').replace('/', '.')}")
            try:
                operator.attrgetter(name)(module)
            except AttributeError:
                missing.append(f"{file}: {name}")
    assert missing == []


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=relative)
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def build_site(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """mkdocs in strict mode, in a process of its own: it counts warnings by logging, which other tests may have turned off."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})


def test_site_builds(tmp_path: Path) -> None:
    result = build_site(ROOT / "mkdocs.yml", tmp_path / "site")
    assert result.returncode == 0, result.stderr
    pages = [page.stem for page in PAGES if page.parent.name == "docs" and page.stem != "index"]
    assert [page for page in pages if not (tmp_path / "site" / page / "index.html").is_file()] == []


def test_site_with_broken_links_does_not_build(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with open(tmp_path / "docs" / "index.md", "a", encoding="utf-8") as page:
        page.write("\n[A page](missing.md)\n[A heading](quickstart.md#not-there)\n")
    result = build_site(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode != 0
    assert "missing.md" in result.stderr
    assert "not-there" in result.stderr


def public_objects() -> Iterator[tuple[str, Any, type | None]]:
    """Every module, class, function, method and property of the package, with the class that it is a member of."""
    yield "reparam_peft", reparam_peft, None
    for info in pkgutil.walk_packages(reparam_peft.__path__, "reparam_peft."):
        module = importlib.import_module(info.name)
        yield info.name, module, None
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != info.name or not callable(value):
                continue
            yield f"{info.name}.{name}", value, None
            for key, member in vars(value).items() if inspect.isclass(value) else ():
                if not key.startswith("_") and isinstance(member, property | classmethod | staticmethod | type(relative)):
                    yield f"{info.name}.{name}.{key}", member, value


def test_everything_public_has_a_docstring() -> None:
    def inherits(owner: type | None, key: str) -> bool:
        return owner is not None and any(hasattr(base, key) for base in owner.__mro__[1:])

    bare = [
        name for name, value, owner in public_objects() if not value.__doc__ and not inherits(owner, name.rpartition(".")[2])
    ]
    assert bare == []
