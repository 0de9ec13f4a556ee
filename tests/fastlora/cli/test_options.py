"""Options: one for each setting, and none that changes what was typed."""

import subprocess
import sys
from typing import get_args

import pytest
from cyclopts import CycloptsError

from fastlora.cli.commands import app
from fastlora.cli.options import SearchFlags, TrainFlags, given, settings_from
from fastlora.data.tasks import BUILTIN
from fastlora.training.config import SearchConfig, TaskLoraConfig, TrainConfig
from fastlora.training.types import types_of


def names(settings):
    return set(types_of(settings))


def test_each_setting_has_an_option_and_each_option_a_setting():
    assert names(TrainFlags) == names(TrainConfig) - {"task"}
    assert names(SearchFlags) == names(SearchConfig)
    arguments = app["train"].assemble_argument_collection()
    shown = {name for argument in arguments for name in argument.names}
    tasks = {f"--{task}.{name}" for task in BUILTIN for name in names(TaskLoraConfig)}
    assert tasks < shown


@pytest.mark.parametrize("command", [name for name in app if not name.startswith("-")])
def test_each_option_has_a_help_text(command):
    for argument in app[command].assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help or argument.children, argument.names


def integer_options():
    """Each option of each command that takes a whole number."""
    for command in app:
        if not command.startswith("-"):
            for argument in app[command].assemble_argument_collection():
                if int in (argument.hint, *get_args(argument.hint)):
                    yield command, argument.names[0]


@pytest.mark.parametrize(("command", "flag"), list(integer_options()))
@pytest.mark.parametrize("value", ["1.5", "2.0", "1e3", "nan"])
def test_no_command_rounds_a_number(command, flag, value):
    before = {"eval": ["run"], "reproduce": ["table1"], "predict": ["run", "file"]}.get(command, [])
    with pytest.raises(CycloptsError, match=f"{flag}"):
        app([command, *before, flag, value], exit_on_error=False, print_error=False)


def test_there_are_integer_options_to_test():
    found = set(integer_options())
    assert {("train", "--epochs"), ("train", "--sst.r"), ("reproduce", "--seeds")} < found
    assert {("search", "--trials"), ("train", "--seed"), ("train", "--limit")} < found


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("adapters = 'per-task'\nepochs = 3\nr = 3\n[sst]\nr = 5\nlr = 0.1\n")
    (sst, _) = get_args(types_of(TrainFlags)["sst"])
    config = settings_from(TrainFlags(epochs=2, sst=sst(r=2)), file)
    assert (config.epochs, config.r) == (2, 3)
    assert config.sst == TaskLoraConfig(r=2, lr=0.1)
    assert settings_from(TrainFlags(), None) == TrainConfig()


def test_what_is_not_given_is_not_there():
    assert given(TrainFlags(rslora=False, limit=1)) == {"rslora": False, "limit": 1}


def test_settings_load_no_command_line_framework():
    code = "import fastlora, sys; fastlora.TrainConfig(); assert 'cyclopts' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
