"""Manifests of the public schema: every published package and every variation comes out as the reference's validator.

Ours may be stricter where pydantic coerces; no case of the data asks for that yet, so none is excepted.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.io.errors import ConfigError
from prts_core.skills.manifest import check_manifest, read_manifest, write_manifest
from tests.skills.golden_skills import DATA, changed, manifests, needs_data, plain, short, verdicts

pytestmark = needs_data
VARIATIONS = verdicts("verdicts_manifest.json")
OTHERS = verdicts("verdicts_other_versions.json") or {}
PUBLISHED = {name: path for name, path in manifests().items() if OTHERS.get(name, {"accepts": True})["accepts"]}


def places(case: dict) -> set[str]:
    return {error["at"] for error in case["errors"]} - {""}


@pytest.mark.parametrize("case", VARIATIONS, ids=map(short, VARIATIONS))
def test_a_variation_is_accepted_or_refused_as_by_the_reference(case: dict):
    raw = changed(plain(DATA / "manifests" / case["base"] / "rskill.yaml"), case["set"], case["delete"])
    if case["accepts"]:
        check_manifest(raw, "a variation")
        return
    with pytest.raises(ConfigError) as caught:
        check_manifest(raw, "a variation")
    assert set((caught.value.field or "").split(", ")) - {""} == places(case), caught.value


@pytest.mark.parametrize("name", OTHERS)
def test_manifests_of_other_versions(name: str):
    case = OTHERS[name]
    if case["accepts"]:
        read_manifest(DATA / name)
        return
    with pytest.raises(ConfigError) as caught:
        read_manifest(DATA / name)
    assert set((caught.value.field or "").split(", ")) == places(case)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_manifest_is_written_as_it_was_read(name: str, tmp_path: Path):
    manifest = read_manifest(PUBLISHED[name])
    written = write_manifest(manifest, tmp_path / "rskill.yaml")
    assert read_manifest(written) == manifest
    assert manifest.is_template == (Path(name).name == "template")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_has_no_key_that_the_file_had_not(name: str, tmp_path: Path):
    """But for those that are spelled out although they are the default."""
    written = plain(write_manifest(read_manifest(PUBLISHED[name]), tmp_path / "rskill.yaml"))
    source = plain(PUBLISHED[name] / "rskill.yaml")
    assert written.keys() - source.keys() <= {"schema_version", "license", "role", "runtime", "quantization"}
    assert all(written.get(key, value) == value for key, value in source.items() if not isinstance(value, dict | list))
