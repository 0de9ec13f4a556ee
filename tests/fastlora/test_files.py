import os
from errno import ENOSPC

import pytest

from fastlora.errors import UserError
from fastlora.files import atomic_folder, atomic_open, cache_folder, read_json, read_toml


def test_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "adapter"
    with atomic_folder(target) as building:
        (building / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with atomic_folder(target) as building:
        (building / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]


def test_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "a").write_text("1")
    with pytest.raises(OSError, match="disk full"), atomic_folder(target) as building:
        (building / "a").write_text("2")
        raise OSError("disk full")
    assert (target / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_failed_file_leaves_the_old_one(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("1")
    with pytest.raises(OSError, match="disk full"), atomic_open(target) as file:
        file.write("2")
        raise OSError("disk full")
    assert target.read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("writing", [atomic_open, atomic_folder])
def test_a_full_disks_error_names_the_file(tmp_path, writing):
    with pytest.raises(OSError, match=r"No space.*result\.json"), writing(tmp_path / "result.json"):
        raise OSError(ENOSPC, "No space left on device")


def test_the_cache_is_in_the_home_or_nowhere(monkeypatch):
    monkeypatch.setenv("FASTLORA_CACHE", "~/x")
    assert str(cache_folder()) == os.path.expanduser("~/x")
    monkeypatch.delenv("FASTLORA_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without a home
    assert not os.path.isfile(cache_folder() / "blocks.json")
    with pytest.raises(OSError), atomic_open(cache_folder() / "blocks.json"):
        pass


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to itself", "folder"])
def test_only_a_regular_file_is_replaced(tmp_path, kind):
    target = tmp_path / "out"
    if "pipe" in kind:
        os.mkfifo(tmp_path / ("out" if kind == "pipe" else "pipe"))
    if kind == "folder":
        target.mkdir()
    elif "link" in kind:
        target.symlink_to("pipe" if "pipe" in kind else "out")
    before = [(path.name, path.lstat().st_mode) for path in tmp_path.iterdir()]
    with pytest.raises(UserError, match="out: is not a regular file"), atomic_open(target) as file:
        file.write("1")
    assert [(path.name, path.lstat().st_mode) for path in tmp_path.iterdir()] == before


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through(tmp_path, exists):
    place = tmp_path / "elsewhere" / "a"
    if exists:
        place.parent.mkdir()
        place.write_text("old")
    (tmp_path / "link").symlink_to("elsewhere/a")
    with atomic_open(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink() and place.read_text() == "new"


@pytest.mark.parametrize("at", [0, 1])
def test_a_kill_while_a_folder_is_replaced_loses_neither(tmp_path, monkeypatch, at):
    """The process ends before the first or the second renaming, and cleans up no more."""
    target, renamed = tmp_path / "adapter", []
    with atomic_folder(target) as building:
        (building / "a").write_text("1")
    replace = os.replace

    def killed(source, to):
        renamed.append(to)
        if len(renamed) > at:
            os._exit(9)
        replace(source, to)

    if not (child := os.fork()):
        monkeypatch.setattr(os, "replace", killed)
        with atomic_folder(target) as building:
            (building / "b").write_text("2")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert sorted(path.name for path in tmp_path.rglob("[ab]")) == ["a", "b"]
    assert target.exists() == (at == 0)
    with atomic_folder(target) as building:
        (building / "c").write_text("3")
    assert [path.name for path in target.iterdir()] == ["c"]


@pytest.mark.parametrize("writing", [atomic_open, atomic_folder])
def test_the_next_write_removes_what_a_killed_one_left(tmp_path, writing):
    mine = {".out.123", ".out-20251231", ".in.fastlora_1"}
    for name in mine:
        (tmp_path / name).touch()
    if not (child := os.fork()):
        with writing(tmp_path / "out"):
            os._exit(9)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 4
    with writing(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "out"}


def test_what_another_is_writing_stays(tmp_path):
    with atomic_folder(tmp_path / "out") as building:
        with atomic_folder(tmp_path / "out"):
            pass
        assert building.is_dir()


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    with atomic_folder(target) as building:
        (building / "a").write_text("1")
    replace = os.replace

    def refuse(source, to):
        if to == target and not str(source).endswith(".old"):
            raise OSError("no")
        replace(source, to)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"), atomic_folder(target) as building:
        (building / "b").write_text("2")
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "a"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ', "[]", "\xff"])
def test_json_that_is_none_is_a_user_error(tmp_path, text):
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["a = 1\na = 2", "[s]\nr = 1\nr = 2", "a = ", "\xff"])
def test_toml_that_is_none_is_a_user_error(tmp_path, text):
    (tmp_path / "x.toml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"x\.toml"):
        read_toml(tmp_path / "x.toml")
