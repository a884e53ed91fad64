"""Installed skills: gates before weights, whole or not at all, one at a time, and a broken record is told and cured."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from prts_core.cli.main import main
from prts_core.io.errors import ConfigError, DataError, PrtsError, StageError
from prts_core.io.files import write_text
from prts_core.skills import registry
from prts_core.skills.admission import SIGNED
from prts_core.skills.digests import package_digest
from prts_core.skills.evaluations import write_evaluation
from prts_core.skills.licence import ALLOW
from prts_core.skills.manifest import read_manifest
from prts_core.skills.registry import find, install, installed, remove
from prts_core.skills.template import write_template
from prts_core.skills.weights import weights_folder
from tests.skills.made_packages import NAME, write_package
from tests.skills.test_skill_evaluations import MEASURED


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This user's skills, none yet."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in (ALLOW, SIGNED):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "data" / "prts" / "skills"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- from a folder ---------------------------------------------------------------------------------------------------
def test_a_folder_is_installed_and_found(tmp_path: Path, home: Path):
    package = write_package(tmp_path / "mine")
    record, notes = install(str(package))
    assert not notes and installed() == [record] and record.package().is_relative_to(home)
    assert files(record.package()) == files(package)
    for name in (NAME, "rskill-pick-cube", "pick-cube", "rskill://pick-cube", f"rskill://{NAME}"):
        assert find(name) == record
    with pytest.raises(ConfigError, match="did you mean 'pick-cube'"):
        find("pick-cub")
    assert remove(NAME) and not remove(NAME) and installed() == []


def test_another_version_replaces_it_and_the_same_changes_nothing(tmp_path: Path):
    first, _ = install(str(write_package(tmp_path / "one")))
    kept = first.package() / "rskill.yaml"
    inode = kept.stat().st_ino
    install(str(tmp_path / "one"))
    assert kept.stat().st_ino == inode
    second, _ = install(str(write_package(tmp_path / "two", b"other", version="0.2.0")))
    assert [record.version for record in installed()] == ["0.2.0"]
    assert second.package().is_dir() and not first.package().exists()


def test_a_damaged_package_is_noticed_and_installed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record, _ = install(str(write_package(tmp_path / "mine")))
    (record.package() / "weights" / "model.safetensors").write_bytes(b"x")
    assert main(["skill", "check", NAME]) == 1 and "install the skill again" in capsys.readouterr().out
    again, _ = install(str(tmp_path / "mine"))
    assert files(again.package()) == files(tmp_path / "mine") and main(["skill", "check", NAME]) == 0


def test_newer_records_of_the_same_package_are_installed(tmp_path: Path):
    package = write_package(tmp_path / "mine")
    first, _ = install(str(package))
    write_evaluation(package, "libero_object", **MEASURED | {"package_digest": package_digest(package)})
    again, _ = install(str(package))
    assert again.folder == first.folder and files(again.package()) == files(package)


def test_a_link_to_what_is_not_in_the_package_is_refused(tmp_path: Path):
    package = write_package(tmp_path / "mine")
    (tmp_path / "secret").write_text("mine alone")
    (package / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"link to what is not in it.*put the file itself there"):
        install(str(package))
    (package / "notes.txt").unlink()
    (package / "notes.txt").write_text("anybody's")
    install(str(package))


def test_a_package_of_links_as_the_hub_keeps_them_has_its_weights(tmp_path: Path):
    package = write_package(tmp_path / "mine")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for at, path in enumerate(sorted(path for path in package.rglob("*") if path.is_file())):
        path.rename(blobs / str(at))
        path.symlink_to(blobs / str(at))
    assert weights_folder(read_manifest(package), package) is not None


def test_skills_of_two_owners(tmp_path: Path):
    install(str(write_package(tmp_path / "one")))
    install(str(write_package(tmp_path / "two", name="other/rskill-pick-cube")))
    with pytest.raises(ConfigError, match="Several skills"):
        find("pick-cube")
    assert find("other/rskill-pick-cube").name == "other/rskill-pick-cube"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "no package at this place"),
        ("https://x.example/y", "of a kind that holds no skills"),
        ("hf://owner", "names no skill of the hub"),
        ("rskill://a b", "names no skill of the hub"),
        ("owner/name", "prts skill install hf://owner/name"),
    ],
)
def test_what_is_no_source(source: str, said: str):
    with pytest.raises(ConfigError, match=said):
        install(source)


@pytest.mark.parametrize("name", ["../x", "a", "a/..", "/a/b", "a/b/c", ".locks/x"])
def test_nothing_outside_is_removed(name: str):
    with pytest.raises(ConfigError, match="no skill's id"):
        remove(name)


# ---- gates -----------------------------------------------------------------------------------------------------------
def test_a_template_is_refused_until_its_words_are_replaced(tmp_path: Path):
    folder = write_template(tmp_path / "new")
    with pytest.raises(ConfigError, match="is a template") as caught:
        install(str(folder))
    assert "replace both words" in str(caught.value)
    path = folder / "rskill.yaml"
    path.write_text(path.read_text().replace("hf://TEMPLATE_ORG/TEMPLATE_ID    #", "local://.  #"))
    path.write_text(path.read_text().replace("TEMPLATE_ORG", "owner").replace("TEMPLATE_ID", "mine"))
    record, notes = install(str(folder))
    assert record.name == "owner/rskill-mine" and "read the vendor's text" in notes[0]


@pytest.mark.parametrize(
    ("change", "environ", "said"),
    [
        ({"kind": "wam"}, {}, "Nothing can load"),
        ({"license": "rlwrld_non_commercial"}, {}, "does not allow commercial use"),
        ({}, {SIGNED: "1"}, "Only signed skills are wanted"),
        ({"chunk_size": 0}, {}, "chunk_size"),
        ({"weights_uri": "local://elsewhere"}, {}, "weights are not in its package"),
        ({"weights_uri": "local:///etc/passwd"}, {}, "weights are not in its package"),
        ({"weights_uri": "local://../other"}, {}, "weights are not in its package"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path: Path, change: dict, environ: dict, said: str):
    (tmp_path / "other").mkdir()
    package = write_package(tmp_path / "mine", **change)
    with pytest.raises(PrtsError, match=said):
        install(str(package), environ=environ)
    assert installed() == []
    if "license" in change:
        assert install(str(package), environ={ALLOW: "1"})[1]
        assert install(str(package), commercial_use=False)[1]


def test_a_record_of_an_evaluation_that_is_not_sound_is_refused(tmp_path: Path):
    package = write_package(tmp_path / "mine")
    write_text(package / "eval" / "x.json", '{"results": []}')
    with pytest.raises(ConfigError, match=r"record of an evaluation.*results"):
        install(str(package))
    write_evaluation(package, "x", **MEASURED)
    with pytest.raises(DataError, match="belongs to another package"):
        install(str(package))
    write_evaluation(package, "x", **MEASURED | {"package_digest": package_digest(package)})
    assert install(str(package))[0].digest == package_digest(package)


# ---- what goes wrong -------------------------------------------------------------------------------------------------
def test_a_broken_record_is_an_error_whose_cure_works(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    package = write_package(tmp_path / "mine")
    install(str(package))
    for broken in ("{", "[]", '{"name": "x"}', "\xff"):
        (home / NAME / "installed.json").write_text(broken, encoding="latin-1")
        with pytest.raises(DataError, match="cannot be read") as caught:
            installed()
        assert main(["skill", "list"]) == 1 and "cannot be read" in capsys.readouterr().err
        assert caught.value.cure is not None
        command = caught.value.cure.split("`")[1].split()
        assert main(command[1:]) == 0 and installed() == []
        install(str(package))
        assert len(installed()) == 1


def test_a_package_that_is_cut_off_is_not_installed(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    install(str(write_package(tmp_path / "one")))
    before = files(home)
    package = write_package(tmp_path / "two", b"other", version="0.2.0")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            install(str(package))
    assert [record.version for record in installed()] == ["0.1.0"] and before.items() <= files(home).items()
    with monkeypatch.context() as patch:
        patch.setattr(registry.shutil, "copy2", die)
        with pytest.raises(KeyboardInterrupt):
            install(str(write_package(tmp_path / "three", name="owner/rskill-x")))
    assert [record.version for record in installed()] == ["0.1.0"]
    install(str(package))
    assert [record.version for record in installed()] == ["0.2.0"] and len([*(home / NAME).iterdir()]) == 2


def test_a_package_that_changes_meanwhile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = write_package(tmp_path / "mine")
    copy = shutil.copy2

    def spoil(source, target):
        (package / "weights" / "model.safetensors").write_bytes(b"changed")
        return copy(source, target)

    monkeypatch.setattr(registry.shutil, "copy2", spoil)
    with pytest.raises(DataError, match="changed while it was copied"):
        install(str(package))
    assert installed() == []


def test_many_at_once(tmp_path: Path):
    packages = [write_package(tmp_path / str(n), bytes([n]), version=f"0.1.{n}") for n in range(4)]
    faults: list[BaseException] = []

    def put(package: Path) -> None:
        try:
            for _ in range(3):
                install(str(package))
                assert len(installed()) == 1
        except BaseException as err:  # noqa: BLE001 told by the test, whatever it is
            faults.append(err)

    threads = [threading.Thread(target=put, args=(package,)) for package in packages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    (record,) = installed()
    assert files(record.package()) == files(packages[int(record.version[-1])])


def test_a_full_disk_is_told_and_costs_nothing(tmp_path: Path, small_disk: Path):
    small, _ = install(str(write_package(tmp_path / "first")), home=small_disk)
    large = write_package(tmp_path / "large", b"x" * 2**20, version="0.2.0")
    with pytest.raises(StageError, match="disk is full"):
        install(str(large), home=small_disk)
    assert installed(small_disk) == [small] and files(small.package(small_disk)) == files(tmp_path / "first")
