"""A run folder: bound to its inputs, owned by one process, and never lost to a kill."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlora.cli import main
from fastlora.errors import Interrupted, RunError, UserError
from fastlora.files import read_toml
from fastlora.runs import folder as folders
from fastlora.runs.session import run_training
from fastlora.runs.trained import load
from fastlora.training.checkpoint import _digests, check_finite
from fastlora.training.config import TrainConfig
from fastlora.training.loop import Trainer
from fastlora.training.stopping import Stop


def run(config, **options):
    return run_training(config, quiet=True, **options)


def stop_after(config, steps):
    """Begin a run and stop it after some steps."""
    stop = Stop()
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.step

        def asking(self, plan):
            stop.asked = self.progress.step + 1 >= steps
            return step(self, plan)

        patch.setattr(Trainer, "step", asking)
        with pytest.raises(Interrupted):
            run(config, stop=stop)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != folders.LOCK
    }


@pytest.fixture
def own_inputs(tiny_config, tmp_path):
    """A configuration whose data and encoder may be changed."""
    given = tiny_config()
    shutil.copytree(given.data, tmp_path / "data")
    shutil.copytree(given.model, tmp_path / "model")
    paths = {"data": tmp_path / "data", "model": str(tmp_path / "model")}
    return replace(given, **paths, tasks=("sst", "sts"), max_steps=6)


def swap_labels(config):
    file = config.data / "ids-sst-train.csv"
    file.write_text(
        file.read_text()
        .replace("\t0\n", "\t9\n")
        .replace("\t4\n", "\t0\n")
        .replace("\t9\n", "\t4\n")
    )


def halve_dev(config):
    file = config.data / "sts-dev.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:12]))


def scale_encoder(config):
    file = Path(config.model) / "model.safetensors"
    tensors = {name: 1.5 * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def change_heads(config):
    file = Path(config.model) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 2}))


def change_vocabulary(config):
    file = Path(config.model) / "vocab.txt"
    file.write_text(file.read_text().replace("film", "movie"))


CHANGES = {
    "the training data of sst": swap_labels,
    "the dev data of sts": halve_dev,
    "the encoder's weights": scale_encoder,
    "the encoder's configuration": change_heads,
    "the tokenizer": change_vocabulary,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_stopped_run_is_bound_to_its_inputs(own_inputs, what):
    stop_after(own_inputs, 3)
    before = contents(own_inputs.out)
    CHANGES[what](own_inputs)
    with pytest.raises(UserError, match=f"run: the run started with other inputs .*{what}"):
        run(own_inputs)
    assert contents(own_inputs.out) == before


def test_edited_settings_are_noticed(own_inputs):
    """--resume reads the very file that was edited."""
    stop_after(own_inputs, 3)
    file = own_inputs.out / "run.toml"
    for old, new in (("seed = 0", "seed = 7"), ("clip = 1.0", "clip = 2.0")):
        file.write_text(file.read_text().replace(old, new))
    edited = replace(TrainConfig.from_table(read_toml(file)), out=own_inputs.out)
    with pytest.raises(UserError, match=r"the setting (seed|clip) \(default -> .*, the setting"):
        run(edited)


def test_a_run_goes_on_with_inputs_that_moved(own_inputs, tmp_path):
    stop_after(own_inputs, 3)
    moved = {key: tmp_path / f"moved-{key}" for key in ("data", "model")}
    for key, place in moved.items():
        Path(getattr(own_inputs, key)).rename(place)
    config = replace(own_inputs, data=moved["data"], model=str(moved["model"]))
    assert run(config).steps == 6
    recorded = read_toml(config.out / "run.toml")
    assert {key: recorded[key] for key in moved} == {k: str(p) for k, p in moved.items()}
    assert load(config.out).source.folder == moved["model"]


@pytest.mark.parametrize("name", ["env.json", "inputs.json"])
def test_a_file_that_is_missing_is_named(own_inputs, name):
    stop_after(own_inputs, 3)
    (own_inputs.out / name).unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        run(own_inputs)


@pytest.mark.parametrize("what", ["the dev data of sts", "the encoder's weights"])
def test_so_is_a_finished_one(own_inputs, what):
    run(own_inputs)
    before = contents(own_inputs.out)
    CHANGES[what](own_inputs)
    with pytest.raises(UserError, match=what):
        run(own_inputs)
    assert contents(own_inputs.out) == before


def test_a_trained_model_is_bound_to_its_encoders_configuration(own_inputs):
    run(own_inputs)
    change_heads(own_inputs)
    with pytest.raises(UserError, match=r"another encoder configuration \(config.json\)"):
        load(own_inputs.out)


def test_the_run_that_is_added_to_is_an_input(own_inputs, tmp_path):
    first = replace(own_inputs, adapters="per-task", tasks=("sst",))
    run(first)
    second = replace(first, add_to=first.out, tasks=("sts",), out=tmp_path / "second")
    stop_after(second, 3)
    shutil.rmtree(first.out)
    run(replace(first, seed=1))
    with pytest.raises(UserError, match="other inputs than these: the run of --add-to"):
        run(second)


def test_a_checkpoint_of_another_run_is_refused(own_inputs, tmp_path):
    stop_after(own_inputs, 3)
    swap_labels(own_inputs)
    other = replace(own_inputs, out=tmp_path / "other")
    stop_after(other, 2)
    shutil.rmtree(other.out / "checkpoints")
    shutil.copytree(own_inputs.out / "checkpoints", other.out / "checkpoints")
    with pytest.raises(UserError, match=r"step-000003: .*the training data of sst"):
        run(other)


def test_files_that_say_the_same_are_the_same_inputs(own_inputs):
    """Another path and other spaces around a label: no token and no label is another."""
    stop_after(own_inputs, 3)
    file = own_inputs.data / "ids-sst-train.csv"
    file.write_text(file.read_text().replace("\t0\n", "\t0.0\n"))
    assert run(own_inputs).steps == 6


def test_a_finished_run_is_reported_and_left_alone(own_inputs, capsys):
    first = run(own_inputs)
    before = contents(own_inputs.out)
    shutil.rmtree(own_inputs.out / "checkpoints")  # as a study does
    assert run_training(own_inputs) == first
    assert "this run is finished" in capsys.readouterr().out
    after = contents(own_inputs.out)
    assert after == {name: before[name] for name in after}


def test_a_run_whose_end_was_cut_off_is_finished(own_inputs):
    first = run(own_inputs)
    (own_inputs.out / "adapter" / "README.md").unlink()  # the last file
    assert run(own_inputs) == first
    assert (own_inputs.out / "adapter" / "README.md").is_file()


HOLD = """
import sys, time
from pathlib import Path
from fastlora.runs.folder import locked
folder = Path(sys.argv[1])
folder.mkdir()
with locked(folder):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_one_process_owns_a_folder(own_inputs):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(own_inputs.out)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"run: process {process.pid} on \S+ is running in it"):
            run(own_inputs)
    finally:
        process.kill()
        process.wait()
    assert run(own_inputs).steps == 6  # the lock of a dead process is none


def test_two_threads_do_not_share_a_folder_either(tmp_path):
    refused = pytest.raises(UserError, match=f"process {os.getpid()} on")
    with folders.locked(tmp_path), refused, folders.locked(tmp_path):
        pass


@pytest.mark.parametrize("last", [folders.LOCK, "env.json", "inputs.json", "run.toml"])
def test_a_start_that_was_killed_goes_on(own_inputs, last, monkeypatch):
    """The process ends as a file of the new folder is about to take its name."""
    replace_file = os.replace

    def killed(source, target):
        if Path(target).name == last:
            Path(source).with_name(f".{last}.12345").write_text("half a")
            raise KeyboardInterrupt
        replace_file(source, target)

    if last == folders.LOCK:
        own_inputs.out.mkdir()
        (own_inputs.out / last).touch()
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", killed)
            run(own_inputs)
    assert not (own_inputs.out / "run.toml").exists()
    assert run(own_inputs).steps == 6


def test_another_file_makes_a_folder_no_runs(own_inputs):
    own_inputs.out.mkdir()
    for name in ("env.json", "thesis.tex"):
        (own_inputs.out / name).write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        run(own_inputs)
    assert {p.name for p in own_inputs.out.iterdir()} == {"env.json", "thesis.tex"}


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "weights": lambda path: flip(path / "model.safetensors"),
    "moments": lambda path: flip(path / "optim.safetensors"),
    "state": lambda path: (path / "state.json").unlink(),
    "no manifest": lambda path: (path / "MANIFEST.json").unlink(),
    "empty manifest": lambda path: (path / "MANIFEST.json").write_text("{}"),
    "list": lambda path: (path / "MANIFEST.json").write_text("[]"),
    "no JSON": lambda path: (path / "MANIFEST.json").write_text("{"),
    "empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints(own_inputs, capsys, damage):
    """One is passed over for the one before it; where all are damaged, nothing starts again."""
    config = replace(own_inputs, save_every=2)
    stop_after(config, 5)
    old, new = sorted((config.out / "checkpoints").iterdir())
    DAMAGE[damage](new)
    stop_after(config, 4)  # before the next checkpoint: it is at step 4 again
    log = (config.out / "train.log").read_text()
    assert f"passed over a damaged checkpoint: {new}: " in log and "after step 4" in log
    for path in (config.out / "checkpoints").iterdir():
        DAMAGE[damage](path)
    with pytest.raises(RunError, match=f"every checkpoint is damaged: .*{old.name}"):
        run(config)
    assert not (config.out / "result.json").exists()


@pytest.mark.parametrize("part", ["", "step-*"])
def test_a_run_that_lost_its_checkpoints_does_not_begin_anew(own_inputs, part):
    config = replace(own_inputs, tokens_per_batch=128, max_steps=14)
    stop_after(config, 12)
    places = config.out / "checkpoints"
    for path in places.glob(part) if part else [places]:
        shutil.rmtree(path)
    with pytest.raises(RunError, match="checkpoints: its checkpoints are missing"):
        run(config)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(own_inputs, monkeypatch):
    config = replace(own_inputs, tokens_per_batch=128, max_steps=14)

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "save", killed)
        run(config)
    assert (config.out / "metrics.jsonl").stat().st_size
    assert run(config).steps == 14


WRONG = [
    {"progress": 5},
    {"progress": {"step": "x"}},
    {"progress": {"step": 3, "sums": [1]}},
    {"progress": {"step": 3, "scores": [{}]}},
    {"progress": {"step": 3, "scores": [{"step": 3, "epoch": 0, "scores": {}}]}},
    {"progress": {"step": -1}},
    {"progress": []},
]


@pytest.mark.parametrize("state", WRONG)
def test_a_state_of_wrong_types_is_one_line(own_inputs, state):
    stop_after(own_inputs, 3)
    (path,) = (own_inputs.out / "checkpoints").iterdir()
    written = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(written | state))
    (path / "MANIFEST.json").write_text(json.dumps(_digests(path)))
    with pytest.raises(RunError, match="step-000003: is not a checkpoint of this run"):
        run(own_inputs)


def test_a_damaged_result_is_one_line(own_inputs):
    result = run(own_inputs)
    file = own_inputs.out / "result.json"
    for old, new in (('"steps": ', '"steps": 1'), ('"table": [', '"table": 5, "x": ['), ("{", "[")):
        whole = file.read_text()
        file.write_text(whole.replace(old, new, 1))
        with pytest.raises(UserError, match=r"result.json: (has changed|cannot be read as JSON)"):
            run(own_inputs)
        file.write_text(whole)
    assert run(own_inputs) == result


def test_other_names_among_the_checkpoints_are_left_alone(own_inputs):
    stop_after(own_inputs, 3)
    places = own_inputs.out / "checkpoints"
    shutil.copytree(places / "step-000003", places / "step-000003.bak")
    (places / "step-notes").mkdir()
    assert run(own_inputs).steps == 6
    assert {"step-000003.bak", "step-notes"} <= {path.name for path in places.iterdir()}


def test_a_checkpoint_set_aside_by_a_killed_process_is_still_one(own_inputs):
    stop_after(own_inputs, 3)
    places = own_inputs.out / "checkpoints"
    (places / "step-000003").rename(places / ".step-000003-ab_c1.old")
    stop_after(own_inputs, 5)
    assert "continuing after step 3" in (own_inputs.out / "train.log").read_text()
    assert [path.name for path in places.iterdir()] == ["step-000005"]


@pytest.mark.parametrize("kind", ["lora_B.default", "heads.sst"])
def test_weights_that_are_not_finite_are_not_saved(own_inputs, monkeypatch, kind):
    step = Trainer.step

    def spoil(self, plan):
        stop = step(self, plan)
        if self.progress.step == 3:
            name = next(n for n, _ in self.model.named_parameters() if kind in n)
            with torch.no_grad():
                self.model.get_parameter(name).view(-1)[0] = torch.inf
        return stop

    monkeypatch.setattr(Trainer, "step", spoil)
    with pytest.raises(RunError, match=rf"{kind}.*not finite after step 4"):
        run(replace(own_inputs, save_every=1))
    checkpoints = [path.name for path in (own_inputs.out / "checkpoints").iterdir()]
    assert sorted(checkpoints) == ["step-000002", "step-000003"]
    assert not (own_inputs.out / "adapter").exists()


def test_the_tensor_that_is_not_finite_is_named():
    check_finite({"a": torch.ones(2), "b": torch.arange(3)}, 1)
    with pytest.raises(RunError, match="'b' are not finite after step 7"):
        check_finite({"a": torch.ones(2), "b": torch.tensor([1, torch.nan])}, 7)


def test_predictions_never_replace_their_input(own_inputs, tmp_path, capsys):
    run(replace(own_inputs, tasks=("sst",), max_steps=1))
    text = "sentence,note\nthe good film,mine\n"
    for name in ("new.csv", "new.jsonl"):
        (tmp_path / name).write_text(text if name == "new.csv" else '{"sentence": "a cat"}\n')
    (tmp_path / "link.csv").symlink_to(tmp_path / "new.csv")
    predict, given = ["predict", str(own_inputs.out)], str(tmp_path / "new.csv")
    for out in ("new.csv", "./new.csv", "link.csv"):
        with pytest.raises(SystemExit) as stop:
            main([*predict, given, "--out", str(tmp_path / out)])
        assert stop.value.code == 2 and "the input" in capsys.readouterr().err
    assert (tmp_path / "new.csv").read_text() == text
    for name in ("new.csv", "new.jsonl"):
        with pytest.raises(SystemExit) as stop:
            main([*predict, str(tmp_path / name)])
        assert stop.value.code == 0
    written = {path.name for path in tmp_path.glob("*.predictions.csv")}
    assert written == {"new.csv.predictions.csv", "new.jsonl.predictions.csv"}
