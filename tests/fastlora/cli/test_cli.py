"""The commands as typed: answers, exit codes, speed of failure, interruption."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fastlora.cli import main
from fastlora.cli.options import TrainFlags, settings_from
from fastlora.console import Log
from fastlora.files import read_toml, write_json
from fastlora.training.checkpoint import _digests

TRAIN = [sys.executable, "-m", "fastlora.cli", "train"]


def call(arguments, capsys):
    """Run `fastlora ...` in this process: exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def train_flags(tiny_model, tiny_data, out, changes=()):
    flags = {"--model": tiny_model, "--data": tiny_data, "--out": out, "--r": 4}
    flags |= dict(zip(changes[::2], changes[1::2], strict=True))
    return ["train", *(part for flag in flags.items() for part in flag)]


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = [*train_flags(tiny_model, tiny_data, folder), "--quiet", "--tokens-per-batch", "256"]
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in flags])
    assert stop.value.code == 0
    return folder


def test_train_shows_banner_and_table(tiny_model, tiny_data, tmp_path, capsys):
    code, out, _ = call(train_flags(tiny_model, tiny_data, tmp_path / "run"), capsys)
    assert code == 0
    lines = out.splitlines()
    names = ["device", "trainable", "model", "data", "examples", "run"]
    assert [line.split()[0] for line in lines[:6]] == names
    assert "sst 96 train, 24 dev, 0 skipped, 0 truncated, 0 empty" in lines[4]
    assert re.search(r"^sts\s+pearson\s", out, re.M)
    assert "adapter and heads in" in lines[-1]
    assert (tmp_path / "run" / "train.log").read_text().splitlines()[:6] == lines[:6]


def test_quiet_prints_nothing(tiny_model, tiny_data, tmp_path, capsys):
    flags = train_flags(tiny_model, tiny_data, tmp_path / "run")
    assert call([*flags, "--quiet", "--max-steps", "2"], capsys) == (0, "", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rr", "3"], "Unknown option: --rr. Did you mean --r?"),
        (["--r", "many"], "--r"),
        (["--lr", "nan"], "lr is nan (expected a number)"),
        (["--weight-decay", "nan"], "weight_decay is nan (expected a number)"),
        (["--clip", "inf"], "clip is inf (expected a number)"),
        (["--resume", "run"], "leave out FILE, --config and --out"),
        (["--r", "0"], "r is 0 (expected 1 or more)"),
        (["--dropout", "1"], "dropout is 1.0 (expected 0 <= p < 1)"),
        (["--targets", "quary"], "did you mean 'query'?"),
        (["--tasks", "ssst"], "did you mean 'sst'?"),
        (["--tasks", "para"], "did you mean 'quora'?"),
        (["--tasks", "tickets"], "[task.tickets] in a file for --config, or train on its file: "),
        (["--tasks", "cfimdb"], "ids-cfimdb-train.csv: no such file"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--model", "./nowhere"], "give --model a local directory"),
        (["--config", "nowhere.toml"], "nowhere.toml: no such file"),
        (["--config", "/dev/zero"], "/dev/zero: no such file"),
        (["--precision", "fp8"], "fp8"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--device", "mps"], "device is 'mps' (expected auto, cpu, cuda or cuda:N)"),
        (["--seed", "-1"], "seed is -1 (expected 0 or more"),
        (["--tasks", ","], "tasks is () (expected at least one task)"),
        (["--lr", "-1"], "lr is -1.0 (expected a positive number)"),
        (["--epochs", "1.5"], "'1.5' is no whole number"),
        (["--schedule", "none"], 'Invalid value "none" for --schedule. Choose from: "linear"'),
        (["--learning-rate", "1e-3"], "unknown option --learning-rate; did you mean --lr?"),
        (["--per_device_train_batch_size", "8"], "did you mean --tokens-per-batch?"),
        (["--use-dora", "yes"], "unknown option --use-dora; dora gains 1 to 2%"),
        (["--targets", "Query"], "did you mean 'query'?"),
        (["--patience", "2"], "pass --eval-every STEPS"),
        (
            ["--mode", "full", "--r", "2"],
            "r is 2 (expected 8, its default, because --mode full",
        ),
        (["--adapters", "per-task", "--tasks", "sts", "--sst.r", "2"], "settings of sst are given"),
    ],
)
def test_usage_errors_exit_2_and_write_nothing(
    flags, message, tiny_model, tiny_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(train_flags(tiny_model, tiny_data, "run", flags), capsys)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message in line and not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["1_0", "\uff15", " 5 ", "", "5\n"])
def test_only_plain_numbers_are_taken(text, capsys):
    train, seeds = ["train", "--data", "nowhere"], ["reproduce", "table1", "--data", "nowhere"]
    search = ["search", "--data", "nowhere", "--budget"]
    options = ([*train, "--epochs"], [*train, "--lr"], [*train, "--sst.r"], [*seeds, "--seeds"])
    for command in (*options, search):
        code, _, err = call([*command, text + "m" * (command is search)], capsys)
        assert code == 2 and command[-1] in err and "nowhere" not in err, command
    code, _, err = call([*search, "99999999999999999y"], capsys)
    assert code == 2 and "too large" in err
    code, _, err = call([*search, "30"], capsys)
    assert code == 2 and "'30' is no time, such as 90s, 30m or 2h" in err


@pytest.mark.parametrize(
    ("error", "end"),
    [(KeyboardInterrupt, (130, "", "")), (MemoryError, (1, "", "error: out of memory\n"))],
)
def test_ctrl_c_during_the_imports_and_too_little_memory(error, end, monkeypatch, capsys):
    class Module:
        app = staticmethod(lambda *_, **__: (_ for _ in ()).throw(error))

    monkeypatch.setitem(sys.modules, "fastlora.cli.commands", Module())
    assert call(["doctor"], capsys) == end


def test_a_terminal_without_the_letters_of_a_path(tmp_path, monkeypatch):
    """As in an ASCII locale, and with the name of a folder that is not UTF-8."""
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", output)
    log = Log(quiet=False)
    log.file = tmp_path / "train.log"
    log.line("caf\xe9 \udce9")
    output.flush()
    assert output.buffer.getvalue() == b"caf\\xe9 \\udce9\n"
    assert log.file.read_bytes() == b"caf\xc3\xa9 \\udce9\n"
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "nowhere"])
    print("caf\xe9")


def test_broken_row_stops_with_file_and_line(tiny_model, tiny_data, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for file in tiny_data.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    file = data / "quora-train.csv"
    lines = file.read_text().splitlines()
    lines[41] = lines[41].rpartition("\t")[0] + "\t"
    file.write_text("\n".join(lines) + "\n")
    flags = train_flags(tiny_model, data, tmp_path / "run")
    code, _, err = call(flags, capsys)
    assert code == 2
    expected = f"error: {file}:42: column 'is_duplicate' is '' (expected 0 or 1). 1 such row; "
    assert err.startswith(expected) and "--bad-rows skip" in err
    assert not (tmp_path / "run").exists()
    code, out, _ = call([*flags, "--bad-rows", "skip", "--max-steps", "1"], capsys)
    assert code == 0 and "quora 95 train, 24 dev, 1 skipped" in out


def test_config_file_and_flags(tiny_model, tiny_data, tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text(
        f"r = 3\nepochs = 2\nmodel = '{tiny_model}'\ndata = '{tiny_data}'\n"
        "tasks = ['sts', 'mine']\nadapters = 'per-task'\n[sts]\nr = 5\n"
        "[task.mine]\nkind = 'classification'\ncolumns = ['sentence']\nlabel = 'sentiment'\n"
        "labels = ['0', '1', '2', '3', '4']\n"
        "files = {train = 'ids-sst-train.csv', dev = 'ids-sst-dev.csv'}\nlora = {r = 2}\n"
    )
    out = tmp_path / "run"
    flags = ["train", "--config", file, "--out", out, "--epochs", "1", "--max-steps", "2"]
    assert call(flags, capsys)[0] == 0
    table = read_toml(out / "run.toml")
    assert (table["r"], table["epochs"], table["sts"]["r"]) == (3, 1, 5)
    assert (out / "predictions" / "mine-dev.csv").exists()
    # run.toml runs the same again, and knows the user's own task.
    again = ["train", "--config", out / "run.toml", "--out", tmp_path / "again"]
    assert call(again, capsys)[0] == 0
    assert read_toml(tmp_path / "again" / "run.toml") == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank = 3\n", "{file}: rank is no setting"),
        ("epoch = 3\n", "{file}: epoch is no setting (did you mean 'epochs'?)"),
        ("epochs = 1.5\n", "{file}: epochs is 1.5 (expected a whole number)"),
        ("epochs = '1'\n", "{file}: epochs is '1' (expected a whole number)"),
        ("epochs = true\n", "{file}: epochs is True (expected a whole number)"),
        ("lr = nan\n", "{file}: lr is nan (expected a number)"),
        ("lr = '1e-3'\n", "{file}: lr is '1e-3' (expected a number)"),
        ("rslora = 1\n", "{file}: rslora is 1 (expected true or false)"),
        ("data = 3\n", "{file}: data is 3 (expected a path)"),
        ("tasks = 'sst'\n", "{file}: tasks is 'sst' (expected a list of names)"),
        ("mode = 'qlora'\n", "{file}: mode is 'qlora' (expected one of lora, frozen, full)"),
        ("[sst]\nrank = 3\n", "{file}: sst.rank is no setting (expected r, alpha"),
        ("[sts]\nr = 2.5\n", "{file}: sts.r is 2.5 (expected a whole number)"),
        ("[sts]\nlr = -1\n", "{file}: sts.lr is -1.0 (expected a positive number)"),
        ("seed = 1\nseed = 2\n", '{file}: not a readable TOML file: Key "seed" already exists'),
        ("r = [\n", "{file}: not a readable TOML file"),
        ("[task.x]\nkind = 1\n", "task"),
        ("task = 'sst'\n", "{file}: task is 'sst' (expected tables [task.NAME])"),
        ("task.sst = 1\n", "task is {{'sst': 1}} (expected tables [task.NAME])"),
        ("[task.x]\nlora = {{rank = 2}}\n", "task.x.lora.rank is no setting"),
        ("[task.x]\nlora = {{r = '2'}}\n", "task.x.lora.r is '2' (expected a whole number)"),
        ("[task.x]\nlora = {{targets = 'query'}}\n", "task.x.lora.targets is 'query'"),
        ("[task.x]\nlora = {{r = 2}}\n", "settings of x need --adapters per-task"),
    ],
)
def test_wrong_config_file(text, message, tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_text(text.replace("{{", "{").replace("}}", "}"))
    code, out, err = call(["train", "--config", file], capsys)
    (line,) = err.splitlines()
    assert code == 2 and not out and message.format(file=file) in line


def test_a_settings_file_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xef\xbb\xbfepochs = 2\n")
    assert settings_from(TrainFlags(), file).epochs == 2


def test_data_here_may_be_of_ones_own_tasks(tiny_model, tiny_data, tmp_path, capsys, monkeypatch):
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        shutil.copy(tiny_data / f"ids-sst-{split}.csv", tmp_path / "data" / f"mine-{split}.csv")
    (tmp_path / "c.toml").write_text(
        f"model = '{tiny_model}'\nmax_steps = 1\nout = 'run'\n"
        "[task.mine]\nkind = 'classification'\ncolumns = ['sentence']\n"
        "label = 'sentiment'\nlabels = ['0', '1', '2', '3', '4']\n"
        "files = {train = 'mine-train.csv', dev = 'mine-dev.csv'}\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(["train", "--config", "c.toml"], capsys)
    assert code == 0 and "./data holds the task files" in out and "mine 96 train" in out
    code, out, _ = call(["eval", "run"], capsys)
    assert code == 0 and re.search(r"^mine\s+accuracy", out, re.M)


def test_texts_are_cut_to_the_encoders_positions(tiny_model, tiny_data, tmp_path, capsys):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    with (data / "ids-sst-train.csv").open("a") as file:
        file.write("\t".join(["99", "long", "good " * 100, "3"]) + "\n")
    code, out, _ = call(train_flags(tiny_model, data, tmp_path / "run"), capsys)
    assert code == 0 and "sst 97 train, 24 dev, 0 skipped, 1 truncated" in out


def test_eval(finished, tiny_data, capsys):
    code, out, _ = call(["eval", finished, "--data", tiny_data], capsys)
    assert code == 0
    trained = (finished / "train.log").read_text()
    for task in ("sst", "quora", "sts"):
        number = re.search(rf"^{task}\s+\w+\s+([\d.-]+|n/a)", out, re.M)[1]
        assert re.search(rf"^{task}\s+\w+\s+{re.escape(number)}\s", trained, re.M)


def test_eval_of_a_checkpoint_and_of_a_part(finished, tiny_data, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    *_, last = sorted((run / "checkpoints").glob("step-*"))
    code, out, _ = call(["eval", run], capsys)
    assert code == 0 and call(["eval", last], capsys)[1].splitlines()[1:] == out.splitlines()[1:]
    trained = load_file(last / "model.safetensors")
    moved = {name: value + name.startswith("heads.") for name, value in trained.items()}
    save_file(moved, last / "model.safetensors")
    assert call(["eval", last], capsys)[0] == 1  # it is not what was saved
    write_json(last / "MANIFEST.json", _digests(last))
    assert call(["eval", last], capsys)[1].splitlines()[1:] != out.splitlines()[1:]
    code, out, _ = call(["eval", run, "--limit", "5"], capsys)
    assert code == 0 and re.search(r"^sst .* 5$", out, re.M)
    code, _, err = call(["eval", run, "--limit", "0"], capsys)
    assert code == 2 and "limit is 0 (expected 1 or more)" in err
    shutil.rmtree(run / "adapter")
    for path in (run, last):
        code, _, err = call(["eval", path], capsys)
        assert code == 2 and f"continue it first: fastlora-train --resume {run}\n" in err


def test_a_finished_run_with_more_epochs_says_what_to_do(finished, capsys):
    code, _, err = call(["train", "--resume", finished, "--epochs", "6"], capsys)
    assert code == 2 and "the setting epochs (default -> 6)" in err and "learning rate" in err
    assert f"fastlora-train --config {finished}/run.toml --out NEW_FOLDER" in err


def test_add_to_takes_the_runs_encoder(tiny_data, tiny_model, tmp_path, capsys):
    flags = ["train", "--data", tiny_data, "--adapters", "per-task", "--max-steps", "1"]
    first = [*flags, "--model", tiny_model, "--tasks", "sst", "--out", tmp_path / "first"]
    assert call(first, capsys)[0] == 0
    code, out, err = call(
        [*flags, "--add-to", tmp_path / "first", "--tasks", "sts", "--dry-run"], capsys
    )
    assert code == 0, err
    assert f"{tiny_model} (that of the run of --add-to)" in out


def test_a_dry_run_makes_no_folder(tiny_model, tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(["train", "--model", tiny_model, "--data", tiny_data, "--dry-run"], capsys)
    assert code == 0 and "a new folder in runs/ (dry run: nothing is written)" in out
    assert not list(tmp_path.iterdir())


def test_modules_in_the_current_folder_are_not_taken(tmp_path):
    """As kernels/ would be in a checkout, in place of Hugging Face's package."""
    (tmp_path / "cyclopts.py").write_text("raise ImportError('this is not cyclopts')")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [*TRAIN, "--data", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere: no such folder" in done.stderr


def test_eval_reads_what_the_run_was_trained_on(finished, tiny_data, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(["eval", finished], capsys)
    assert code == 0 and f"on {tiny_data}\n" in out
    code, _, err = call(["eval", finished, "--data", "nowhere"], capsys)
    assert code == 2 and "nowhere: no such folder" in err


def test_eval_can_leave_bad_rows_out(finished, tiny_data, tmp_path, capsys):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    with (data / "quora-dev.csv").open("a") as file:
        file.write("99\tx\ta\tb\t\n")
    code, _, err = call(["eval", finished, "--data", data], capsys)
    assert code == 2 and "--bad-rows skip" in err
    assert call(["eval", finished, "--data", data, "--bad-rows", "skip"], capsys)[0] == 0


def test_eval_uses_the_cache_and_predict_does_not(
    finished, tiny_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "new.csv").write_text("sentence\na good film\n")
    assert call(["predict", finished, tmp_path / "new.csv", "--task", "sst"], capsys)[0] == 0
    assert not (tmp_path / "cache").exists()
    code, out, _ = call(["eval", finished, "--data", tiny_data], capsys)
    assert code == 0 and len(list((tmp_path / "cache" / "tokens").iterdir())) == 3
    assert call(["eval", finished, "--data", tiny_data], capsys) == (0, out, "")


def test_predict_writes_a_row_for_each_row(finished, tmp_path, capsys):
    file = tmp_path / "new.csv"
    file.write_text('sentence\n a good film .\n""\nnot very good\n')
    code, out, _ = call(["predict", finished, file, "--task", "sst"], capsys)
    assert code == 0 and "3 predictions in" in out and "(0 texts truncated)" in out
    lines = (tmp_path / "new.csv.predictions.csv").read_text().splitlines()
    assert lines[0] == "sentence,prediction,probability" and len(lines) == 4


@pytest.mark.parametrize(
    ("out", "what"), [("new.csv", "the input itself"), ("", "not a regular file")]
)
def test_predict_writes_neither_over_its_input_nor_to_a_folder(
    finished, tmp_path, capsys, out, what
):
    file = tmp_path / "new.csv"
    file.write_text("sentence\ngood\n")
    flags = ["predict", finished, file, "--task", "sst", "--out", tmp_path / out]
    code, _, err = call(flags, capsys)
    assert code == 2 and f"{what} (expected the name of a file" in err
    assert file.read_text() == "sentence\ngood\n" and list(tmp_path.iterdir()) == [file]


def test_predict_makes_no_folder_of_a_mistyped_name(finished, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("sentence\ngood\n")
    flags = ["predict", finished, tmp_path / "new.csv", "--task", "sst", "--out"]
    assert call(["predict", finished, "/dev/zero"], capsys)[2] == "error: /dev/zero: no such file\n"
    code, _, err = call([*flags, tmp_path / "mistyped" / "out.csv"], capsys)
    assert code == 2 and "mistyped: no such folder" in err and not (tmp_path / "mistyped").exists()


def test_predict_reads_a_pipe(finished, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    write = "open('pipe', 'w').write('sentence\\na good film\\n')"
    with subprocess.Popen([sys.executable, "-c", write], cwd=tmp_path):
        flags = ["predict", finished, tmp_path / "pipe", "--task", "sst"]
        assert call([*flags, "--out", tmp_path / "out.csv"], capsys)[0] == 0
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("command", ["predict", "eval", "compare", "export", "search"])
def test_only_training_runs_in_several_processes(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call([command, "runs/none"], capsys)
    assert code == 2 and "start without torchrun" in err


def test_predict_names_the_tasks(finished, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("sentence\na\n")
    code, _, err = call(["predict", finished, tmp_path / "new.csv"], capsys)
    assert code == 2 and "columns named 'task'" in err and "name the rows' task with --task" in err
    code, _, err = call(["predict", finished, tmp_path / "new.csv", "--task", "stt"], capsys)
    assert code == 2 and "expected one of sst, quora, sts); did you mean 'sts'?" in err
    code, _, err = call(["predict", finished, tmp_path / "new.csv", "--task", "para"], capsys)
    assert code == 2 and "did you mean 'quora'?" in err
    for name in ("no.csv", ""):  # "" is a folder
        code, _, err = call(["predict", finished, tmp_path / name, "--task", "sst"], capsys)
        assert code == 2 and "no such file" in err


def test_merge(finished, tmp_path, capsys):
    code, out, _ = call(["merge", finished, tmp_path / "merged"], capsys)
    assert code == 0 and out.startswith(f"merged encoder in {tmp_path / 'merged'}, ")
    code, _, err = call(["merge", finished, tmp_path / "merged"], capsys)
    assert code == 2 and "not empty" in err


def test_unfinished_folder_is_named(tmp_path, capsys):
    code, _, err = call(["train", "--resume", tmp_path / "nowhere"], capsys)
    assert code == 2 and "nowhere: holds no run to resume" in err
    code, _, err = call(["eval", tmp_path], capsys)
    assert code == 2 and "expected a finished run folder" in err


def test_doctor(capsys):
    code, out, _ = call(["doctor"], capsys)
    assert code == 0 and re.search(r"^kernels\s+reference", out, re.M)


def test_without_a_reader_of_its_output_a_command_goes_on(tmp_path, monkeypatch):
    def close_reader():
        read, write = os.pipe()
        os.close(read)
        monkeypatch.setattr(sys, "stdout", os.fdopen(write, "w"))

    close_reader()
    log = Log(quiet=False)
    log.file = tmp_path / "train.log"
    for text in ("one", "two"):
        log.line(text)
    assert log.file.read_text() == "one\ntwo\n"
    close_reader()
    with pytest.raises(SystemExit, match="141"):
        main(["doctor"])
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(sys, stream, None)  # closed before the start
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "nowhere"])
    assert sys.stdin.read() == ""


def test_help_typo_and_missing_file_are_fast(tmp_path):
    """Each in half the time of importing torch, so none imports it."""

    def cpu_seconds(command, code):
        before = os.times()
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == code
        after = os.times()
        spent = after.children_user + after.children_system
        return spent - before.children_user - before.children_system

    # A core is slower beside others' work, so both are timed in the same seconds.
    limit = cpu_seconds([sys.executable, "-c", "import torch"], 0) / 2
    for flags, code in ((["--help"], 0), (["--rr", "1"], 2), (["--data", "nowhere"], 2)):
        assert cpu_seconds([*TRAIN, *flags], code) < limit, flags


@pytest.mark.slow
def test_interrupt_exits_130_and_says_how_to_go_on(tiny_model, tiny_data, tmp_path, capsys):
    flags = train_flags(tiny_model, tiny_data, tmp_path / "run")[1:]
    command = [*TRAIN, *map(str, flags), "--epochs", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.splitlines()[-1] == f"  fastlora-train --resume {tmp_path / 'run'}"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/MANIFEST.json"))
    # What was printed works: the settings come from the run folder.
    code, out, err = call(["train", "--resume", tmp_path / "run", "--dry-run"], capsys)
    assert code == 0, err
    assert Path(tmp_path / "run").name in out
