"""What the benchmark runs on: device, driver and versions, without names of hosts, users or paths."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "flash-attn-3", "flash-attn", "numpy")


def describe(device: str) -> dict[str, Any]:
    """{"device": {name, type, ...}, "versions": {...}}. RuntimeError where there is no such device."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions.update({package: _version(package) for package in PACKAGES})
    versions["flash_attn_interface (FA3)"] = _present("flash_attn_interface")
    versions["cuda"] = torch.version.cuda
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        about: dict[str, Any] = {"name": "cpu", "type": "cpu", "architecture": platform.machine(), "cores": cores}
        return {"device": about, "versions": versions}
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device")
    properties = torch.cuda.get_device_properties(device)
    versions["cudnn"] = str(torch.backends.cudnn.version())
    versions["driver"] = driver()
    return {
        "device": {
            "name": torch.cuda.get_device_name(device),
            "type": "cuda",
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30),
            "l2_mib": round(int(getattr(properties, "L2_cache_size", 0)) / 2**20),
            "cores": os.cpu_count(),
        },
        "versions": versions,
    }


def driver() -> str | None:
    """The driver's version, from the kernel module; None where it does not say."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as handle:  # noqa: PTH123 - a kernel's file
            words = handle.readline().split()
    except OSError:
        return None
    return next((w for w in words if w[0].isdigit() and w.count(".") >= 1), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _present(module: str) -> str | None:
    from importlib.util import find_spec

    return "present" if find_spec(module) else None
