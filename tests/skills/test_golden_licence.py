"""The licence gate: every posture, use and value of the environment comes out as the reference's."""

from __future__ import annotations

import pytest

from prts_core.io.errors import ConfigError
from prts_core.skills.licence import ALLOW, ask_licence, commercial_use_allowed
from prts_core.skills.manifest import check_manifest
from tests.skills.golden_skills import DATA, needs_data, plain, verdicts

pytestmark = needs_data
CASES = verdicts("licence_gate.json")


@pytest.mark.parametrize("case", CASES, ids=[f"{c['license']}-{c['commercial_use']}-{c['env']}" for c in CASES])
def test_the_gate(case: dict):
    raw = plain(DATA / "manifests" / "act-aloha" / "rskill.yaml") | {"license": case["license"]}
    manifest, environ = check_manifest(raw, "a variation"), {} if case["env"] is None else {ALLOW: case["env"]}
    assert commercial_use_allowed(manifest.license) is case["is_commercial_use_allowed"]
    if case["outcome"] == "refused":
        with pytest.raises(ConfigError, match="does not allow commercial use"):
            ask_licence(manifest, commercial_use=case["commercial_use"], environ=environ)
    else:
        said = ask_licence(manifest, commercial_use=case["commercial_use"], environ=environ)
        assert said.commercial is case["is_commercial_use_allowed"] and bool(said.notes) is not said.commercial
