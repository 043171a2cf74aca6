"""`--config`: what a YAML file sets, what wins over it, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from support.command_line import Run, assert_error
from typer.testing import CliRunner

from reparam_peft import __version__
from reparam_peft.cli import app as cli
from reparam_peft.cli import settings_file as settings_file
from reparam_peft.cli.command_options import Kind
from reparam_peft.cli.errors import CliError

Call = Callable[..., dict[str, Any]]
COMMANDS = {name: command for name, command in typer.main.get_command(cli.app).commands.items() if name != "run"}


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    """Write a settings file."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call a command of the command line; gives the arguments that its function gets, and does no work."""
    app = typer.main.get_command(cli.app)

    def run(name: str, *arguments: object) -> dict[str, Any]:
        given: dict[str, Any] = {}
        monkeypatch.setattr(app.commands[name], "callback", given.update)
        app.main([name, *map(str, arguments)], standalone_mode=False)
        return given

    return run


def test_the_file_sets_what_the_command_line_does_not(call: Call, file: Callable[[str], Path]) -> None:
    path = file("model: a\noutput: b\nkeep: 0.5\nwindows: 3\nseed: 7\nevaluate: false\nrefine: true\njson: true\nplan: p.json")
    given = call("compress", "--config", path)
    assert (given["model"], given["output"], given["keep"], given["windows"]) == ("a", Path("b"), 0.5, 3)
    assert (given["evaluate"], given["refine"], given["as_json"], given["plan"]) == (False, True, True, Path("p.json"))
    assert (given["seed"], given["length"], given["sequential"], given["text"]) == (7, 512, False, None)
    for arguments in (["c", "d", "--config", path], ["--config", path, "c", "d"]):
        given = call("compress", *arguments, "--keep", 0.25, "--evaluate", "--windows", 8)
        assert (given["model"], given["output"], given["keep"]) == ("c", Path("d"), 0.25)
        assert (given["evaluate"], given["windows"], given["seed"]) == (True, 8, 7), "a default that is named wins, too"


@pytest.mark.parametrize("value", ["null", "~", ""])
@pytest.mark.parametrize("key", ["windows", "keep", "evaluate", "json", "target-modules"])
def test_null_is_the_default(call: Call, file: Callable[[str], Path], key: str, value: str) -> None:
    assert call("compress", "a", "b", "--config", file(f"{key}: {value}")) == call("compress", "a", "b")


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "---\n"])
def test_a_file_may_be_empty(call: Call, file: Callable[[str], Path], text: str) -> None:
    assert call("plan", "a", "--config", file(text)) == call("plan", "a")


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        ("target-modules: [q_proj, mlp.up_proj]", "target_modules", "q_proj,mlp.up_proj"),
        ("exclude_modules:\n- q_proj\n- lm_head", "exclude_modules", "q_proj,lm_head"),
        ("target_modules: [q_proj]", "target_modules", "q_proj"),
        ("target-modules: all-linear", "target_modules", "all-linear"),
        ("target-modules: '.*(q|v)_proj'", "target_modules", ".*(q|v)_proj"),
        ("methods: [whitened, autoencoder]", "methods", "whitened,autoencoder"),
        ("max-increase: 5%", "max_increase", "5%"),
        ("max_increase: 0.05", "max_increase", "0.05"),
        ("allocation: 'no'", "allocation", "no"),
        ("text: 2024-01-01", "text", "2024-01-01"),
        ("target_modules: [0, 1]", "target_modules", "0,1"),
    ],
)
def test_values_of_search(call: Call, file: Callable[[str], Path], line: str, name: str, expected: object) -> None:
    assert call("search", "a", "b", "--config", file(line))[name] == expected


@pytest.mark.parametrize(
    ("command", "line", "name", "expected"),
    [
        ("compress", "rank: 16", "rank", "16"),
        ("compress", "rank: full", "rank", "full"),
        ("compress", "keep: 1", "keep", 1.0),
        ("heal", "learning-rate: 5e-4", "learning_rate", 5e-4),  # text, for YAML 1.1
        ("heal", "bf16: yes", "bf16", True),
        ("export", "to: onnx", "to", Kind.onnx),
        ("export", "self-contained: true", "self_contained", True),
        ("report", "measure: off", "measure", False),
        ("evaluate", "speed: on", "speed", True),
    ],
)
def test_values_of_other_commands(
    call: Call, file: Callable[[str], Path], command: str, line: str, name: str, expected: object
) -> None:
    positional = {"compress": ["a", "b"], "heal": ["a", "b"], "export": ["a", "b"], "report": ["a"], "evaluate": ["a"]}
    assert call(command, *positional[command], "--config", file(line))[name] == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_it_and_has_examples(call: Call, file: Callable[[str], Path], command: str) -> None:
    arguments = [p.name for p in COMMANDS[command].params if p.param_type_name == "argument"]
    assert arguments
    lines = [f"{name}: {name}" for name in arguments]
    given = call(command, "--config", file("\n".join([*lines, "device: cpu", "dtype: bfloat16", "json: true"])))
    assert {name: str(given[name]) for name in arguments} == {name: name for name in arguments}
    assert (given["device"], given["dtype"], given["as_json"]) == ("cpu", "bfloat16", True)
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "--config" in shown.output
    assert f"reparam {command} " in shown.output.split("Examples:")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_valid(call: Call, file: Callable[[str], Path], command: str) -> None:
    arguments = [p.name for p in COMMANDS[command].params if p.param_type_name == "argument"]
    path = file("\n".join(f"{name}: {name}" for name in arguments))
    examples = [line[3:-1].split() for line in COMMANDS[command].epilog.splitlines() if line.startswith("- ")]
    assert any("--config" in words for words in examples)
    for program, name, *words in examples:
        assert (program, name) == ("reparam", command)
        assert call(command, *(path if word == "settings.yaml" else word for word in words))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "kep: 0.8",
            "`kep` is not a setting of `.*compress`; those are model, output, keep, rank, budget, bits, ",
        ),
        ("speed: true", "`speed` is not a setting of"),  # of another command
        ("no-evaluate: true", "`no-evaluate` is not a setting of"),
        ("config: other.yaml", "`config` is not a setting of"),
        ("help: true", "`help` is not a setting of"),
        ("as_json: true", "`as_json` is not a setting of"),
        ("1: 2", "`1` is not a setting of"),
        ("yes: 2", "`True` is not a setting of"),
        ("target-modules: a\ntarget_modules: b", "`target_modules` is there twice"),
        ("keep: much", "`keep`: .*number|float.*, got 'much'"),
        ("keep: true", "`keep`: must be text or a number .*, got True"),
        ("keep: [0.8]", r"`keep`: must be text or a number, got \['0.8'\]"),
        ("text: {a: b}", "`text`: must be text or a number, got {'a': 'b'}"),
        ("keep: 2020-99-99", "`keep`: .* got '2020-99-99'"),
        ("keep: 1" + "0" * 5000, "`keep`: must be a finite number"),
        ("keep: 0x" + "f" * 5000, "`keep`: .* got '0xfff"),
        ("keep: " + "[" * 3000 + "]" * 3000, "cannot be read"),
        ("keep: &a 0.5\nfloor: *a", r"refers to another part of itself by `\*`"),
        ("<<: {keep: 0.5}", "`<<` is not a setting of"),
        ("keep: !!python/name:os.system x", "cannot be read"),
        ("windows: 2.5", "`windows`: .*integer.*, got '2.5'"),
        ("windows: 0", "`windows`: .*1, got '0'"),
        ("calibration-windows: -1", "`calibration-windows`: .*1, got '-1'"),
        ("evaluate: 'false'", "`evaluate`: must be true or false, got 'false'"),
        ("evaluate: 0", "`evaluate`: must be true or false, got '0'"),
        ("refine: [true]", r"`refine`: must be true or false, got \[True\]"),
        ("target-modules: []", r"`target-modules`: must be a list of names, or one text, got \[\]"),
        ("target-modules: [.*q_proj, v_proj]", "`target-modules`: must be a list of names, or one text"),
        ("target-modules: {a: b}", "`target-modules`: must be text or a number or a list of names"),
        ("- keep", "must hold lines such as `keep: 0.8`, got a list"),
        ("keep", "must hold lines such as `keep: 0.8`, got a str"),
        ("keep: [", "cannot be read: "),
        ("keep: !!python/object/apply:os.getcwd []", "cannot be read: .*could not determine a constructor"),
    ],
)
def test_a_bad_file_is_refused(call: Call, file: Callable[[str], Path], text: str, message: str) -> None:
    path = file(text)
    for arguments in ([], ["a", "b"], ["a", "b", "--keep", 0.5]):
        with pytest.raises(CliError, match=f"(?s){path}.*{message}"):
            call("compress", "--config", path, *arguments)


def test_choices_are_named(call: Call, file: Callable[[str], Path]) -> None:
    with pytest.raises(CliError, match=r"`to`: .*'standalone'.*'dense'.*'onnx'.*got 'pdf'"):
        call("export", "a", "b", "--config", file("to: pdf"))


def test_a_file_that_cannot_be_read_is_refused(call: Call, tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(CliError, match=f"--config {path} cannot be read"):
            call("plan", "a", "--config", path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(CliError, match="cannot be read"):
        call("plan", "a", "--config", tmp_path / "binary")


@pytest.mark.parametrize("text", ["kep: 0.8", "keep: ["])
def test_errors_are_one_line(run: Run, file: Callable[[str], Path], text: str) -> None:
    result = run("plan", "a", "--config", file(text))
    assert_error(result, "settings.yaml")
    assert result.err.count("\n") == 1


def test_a_missing_argument_is_still_missed(file: Callable[[str], Path]) -> None:
    result = CliRunner().invoke(cli.app, ["compress", "--config", str(file("model: a"))])
    assert result.exit_code == 2
    assert "OUT" in result.output


def test_help_shows_the_file_as_defaults(file: Callable[[str], Path]) -> None:
    path = str(file("windows: 1234"))
    result = CliRunner().invoke(cli.app, ["evaluate", "--config", path, "--help"], env={"COLUMNS": "200"})
    assert "[default: 1234]" in result.output
    assert "1234" not in CliRunner().invoke(cli.app, ["evaluate", "--help"], env={"COLUMNS": "200"}).output


def test_lists_are_for_options_that_exist() -> None:
    options = {parameter.name for command in COMMANDS.values() for parameter in command.params}
    assert set(settings_file.LISTS) <= options


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("reparam he", "heal"),
        ("reparam compress --ke", "--keep"),
        ("reparam plan demo --conf", "--config"),
        ("reparam export a b --to o", "onnx"),
    ],
)
def test_completion(words: str, expected: str) -> None:
    asked = {"_REPARAM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(cli.app, prog_name="reparam", env=asked)
    assert (result.exit_code, result.output.split()) == (0, [expected])


def test_a_key_that_is_there_twice_is_refused(call: Call, file: Callable[[str], Path]) -> None:
    with pytest.raises(CliError, match="`keep` is there twice"):
        call("compress", "a", "b", "--config", file("keep: 0.8\nkeep: 0.5"))
