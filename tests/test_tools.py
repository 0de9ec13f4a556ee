"""The campaigns of tools/ in short, seeded forms."""

import os
import random
import sys

import damage
import fuzz
import kills
import memory
import numerics
import peers
import pytest
from tally import Tally, comparison, failure

pytest.importorskip("triton", reason="Triton is for Linux only")


def run(monkeypatch, capfd, tool, *arguments):
    """The exit code of a tool and its last line."""
    monkeypatch.setattr(sys, "argv", [tool.__name__, *arguments])
    monkeypatch.setenv("FASTLORA_CACHE", os.environ["FASTLORA_CACHE"])  # the tools set another
    code = tool.main()
    return code, capfd.readouterr().out.splitlines()[-1]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))


def test_readers_take_damaged_files_or_say_what_is_wrong(monkeypatch, capfd):
    code, line = run(monkeypatch, capfd, fuzz, "--count", "120")
    assert code == 0 and line.startswith("fuzz: 120 attempts") and " 0 wrong" in line


def test_fuzzing_notices_a_reader_that_fails():
    def read(_):
        raise KeyError("settings")

    assert fuzz.verdict_of(read, random.Random(0)) == ("wrong", "KeyError: 'settings'")


def test_random_calls_of_the_operation_are_as_exact_as_pytorchs(monkeypatch, capfd):
    code, line = run(monkeypatch, capfd, numerics, "--count", "6")
    assert code == 0 and line.startswith("numerics: 6 attempts, 6 right")


def test_numerics_notices_a_wrong_result(monkeypatch, capfd):
    right = numerics.lora_grouped
    monkeypatch.setattr(numerics, "lora_grouped", lambda *a: right(*a) * 1.01)
    code, line = run(monkeypatch, capfd, numerics, "--count", "2")
    assert code == 1 and "2 wrong" in line


def test_growing_memory_is_noticed():
    assert memory.growth([100.0 + 0.1 * i for i in range(1000)]) > memory.GROWTH
    assert memory.growth([50.0, *[100.0] * 999]) == 0


def test_a_tally_with_anything_wrong_exits_1(capsys):
    tally = Tally("some")
    tally.add("right", "")
    assert tally.finish() == 0
    tally.add(comparison({"scores": 1, "adapter": 2}, {"scores": 1, "adapter": 3}), "seed 3")
    assert tally.finish() == 1 and "WRONG seed 3: other adapter" in capsys.readouterr().out


def test_a_verdict_says_how_a_command_ended():
    assert failure(2, "a note\nerror: no such file") == "refused"
    assert failure(70, "Traceback\nKeyError: 3") == "wrong: exit code 70, last line 'KeyError: 3'"


@pytest.mark.slow
def test_killed_runs_go_on(monkeypatch, capfd):
    code, line = run(monkeypatch, capfd, kills, "--operations", "6", "--random", "2")
    assert code == 0 and line.startswith("kills: 8 attempts, 8 right")


@pytest.mark.slow
def test_damaged_runs_are_refused_or_end_the_same(monkeypatch, capfd):
    code, line = run(monkeypatch, capfd, damage, "--count", "1")
    assert code == 0 and " 0 wrong" in line


@pytest.mark.slow
def test_a_changed_bit_of_an_adapter_is_noticed_by_fastlora(monkeypatch, capfd):
    code, line = run(monkeypatch, capfd, peers, "--kills", "1", "--flips", "20")
    assert code == 0 and line.startswith("fastlora, a bit of its adapter changed: 20 attempts, ")
    assert " 20 refused, 0 wrong" in line
