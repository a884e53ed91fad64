"""One way to open a policy, wherever it lies: a folder, the hub, an installed skill, weights beside their package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prts_core.cli.main import main
from prts_core.config.model import ModelConfig
from prts_core.delivery.open_policy import open_policy
from prts_core.delivery.resolve import resolve
from prts_core.io.errors import CheckpointError, ConfigError, PrtsError
from prts_core.policy.policy import load_policy
from prts_core.release.policy import import_released
from prts_core.skills.digests import package_digest
from prts_core.skills.manifest import FILE
from prts_core.skills.signature import new_key, sign
from tests.fixtures.released import needs_case, write_checkpoint, write_fast
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.tiny_policy import write_policy
from tests.skills.test_skill_hub import COMMITS, _home, hub, publish

__all__ = ["_home", "hub"]


def chunk(policy) -> np.ndarray:
    meant = policy.contract.contract
    seen = {c.key: np.zeros((1, c.height, c.width, 3), np.uint8) for c in meant.cameras}
    seen["observation.state"] = np.zeros((1, len(meant.state)), np.float32)
    return policy.act(seen, ["open the faucet"], [3])


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return write_policy(tmp_path / "policy", MODEL)


@pytest.fixture
def package(policy: Path, tmp_path: Path) -> Path:
    out = tmp_path / "package"
    assert (
        main(["skill", "pack", str(policy), "--name", "owner/rskill-tiny", "--out", str(out), "--licence", "mit"]) == 0
    )
    return out


def test_the_same_policy_from_everywhere(policy: Path, package: Path, hub: Path, tmp_path: Path):
    expected = chunk(load_policy(policy))
    publish(hub, "owner/plain", COMMITS[0], policy)
    publish(hub, "owner/rskill-tiny", COMMITS[1], package, "v1")
    assert main(["skill", "install", str(package)]) == 0
    for source in (
        package,
        "hf://owner/plain",
        "hf://owner/rskill-tiny@v1",
        "rskill://tiny",
        "rskill://owner/rskill-tiny",
    ):
        np.testing.assert_array_equal(chunk(open_policy(str(source)).policy), expected), source
    named = [resolve(source).package_digest for source in (str(package), "hf://owner/rskill-tiny@v1", "rskill://tiny")]
    assert len(set(named)) == 1
    for source, told in (("rskill://lost", "No skill"), ("hf://owner/gone", "nor can it be fetched")):
        with pytest.raises((ConfigError, CheckpointError), match=told):
            open_policy(source)


def test_weights_that_lie_beside_their_package(policy: Path, package: Path, hub: Path, tmp_path: Path):
    """The package holds the manifest alone; whose weights are meant is signed with it."""
    publish(hub, "vendor/weights", COMMITS[0], policy)
    for path in [*package.iterdir()]:
        if path.name != FILE:
            path.unlink()
    manifest = package / FILE
    manifest.write_text(manifest.read_text().replace("local://.", "hf://vendor/weights@main"))
    new_key(tmp_path / "me.pem")
    sign(package, tmp_path / "me.pem")
    found = resolve(str(package), trusted=tmp_path)
    assert found.policy.name == COMMITS[0] and found.package_digest == package_digest(package)
    np.testing.assert_array_equal(chunk(open_policy(str(package)).policy), chunk(load_policy(policy)))
    other = write_policy(tmp_path / "other", ModelConfig(**{**vars(MODEL), "chunk_length": 6}))
    publish(hub, "vendor/weights", COMMITS[1], other)
    with pytest.raises(CheckpointError, match="not those that a package lists"):
        open_policy(str(package))


@needs_case
def test_golden_released_checkpoint_is_packaged(tmp_path: Path):
    checkpoint, fast = write_checkpoint(tmp_path / "released"), write_fast(tmp_path / "fast")
    (tmp_path / "policy").mkdir()
    import_released(checkpoint, tmp_path / "policy", fast=fast, control_hz=10, embodiment_tag="libero_panda")
    args = ["--name", "owner/imported", "--out", str(tmp_path / "package")]
    assert main(["skill", "pack", str(tmp_path / "policy"), *args]) == 0
    assert main(["skill", "check", str(tmp_path / "package")]) == 0
    np.testing.assert_array_equal(
        chunk(open_policy(str(tmp_path / "package")).policy), chunk(load_policy(tmp_path / "policy"))
    )


def test_a_skill_of_another_family_says_what_to_do(package: Path, tmp_path: Path):
    (package / "policy_contract.json").unlink()
    (package / "digests.json").unlink()
    new_key(tmp_path / "me.pem")
    sign(package, tmp_path / "me.pem")
    with pytest.raises(PrtsError, match=r"format that nothing here loads.*import-policy"):
        open_policy(str(package))
