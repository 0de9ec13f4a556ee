import pytest

from fastlora.files import atomic_folder, atomic_open


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
