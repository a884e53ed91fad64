"""Tell a user what went wrong in one family of errors: each names file, field, found, expected and the cure.

The command line prints `str(error)`, Dagster shows it as the failure's text. A command in a cure stands in backquotes,
so that it can be copied without the sentence's full stop.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class PrtsError(ValueError):
    """A fault in what came from outside, told as one paragraph.

    Parameters
    ----------
    problem: one sentence, what is wrong.
    file, field: where. found, expected: values, shown with `repr` unless they are strings.
    cure: what the reader can do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        field: str | None = None,
        found: object = None,
        expected: object = None,
        cure: str | None = None,
    ) -> None:
        self.problem, self.file, self.field, self.found, self.expected, self.cure = (
            problem,
            None if file is None else str(file),
            field,
            found,
            expected,
            cure,
        )
        parts = [problem.rstrip(".") + "."]
        for label, value in (("File", self.file), ("Field", field), ("Found", found), ("Expected", expected)):
            if value is not None:
                parts.append(f"{label}: {value if isinstance(value, str) else repr(value)}.")
        if cure:
            parts.append(f"Cure: {cure.rstrip('.')}.")
        super().__init__(" ".join(parts))

    def set_cure(self, cure: str) -> None:
        """Say another cure: for whoever knows more than the place that raised."""
        known = {name: getattr(self, name) for name in ("file", "field", "found", "expected")}
        PrtsError.__init__(self, self.problem, **known, cure=cure)


class ConfigError(PrtsError):
    """A recipe, dataset or robot YAML that does not say what it should."""


class DataError(PrtsError):
    """A dataset or recording that breaks its own format or laws."""


class ContractError(PrtsError):
    """Two sides that meet (dataset and checkpoint, client and server) disagree on what the numbers mean."""


class CheckpointError(PrtsError):
    """A checkpoint or package folder that cannot be loaded as what it claims to be."""


class StageError(PrtsError):
    """A stage that cannot run: a parent is missing, an output is damaged, the disk is full or read-only."""


class UnavailableError(PrtsError):
    """Something asked for that this machine does not have; an error."""


class Skipped(PrtsError):
    """An optional dataset is not here: its partition is left out (exit status 3)."""


class Stopped(PrtsError):
    """Work stopped on request after leaving a checkpoint (exit status 75)."""


class ServeError(PrtsError):
    """A request or a server setting that is refused."""


class SimulatorError(PrtsError):
    """A simulator, or the worker process it runs in, that cannot do what it was asked."""


class MissingExtraError(PrtsError):
    """An optional package is not installed."""


_FIELDS = ("problem", "file", "field", "found", "expected", "cure")


def to_plain(err: PrtsError) -> dict[str, Any]:
    """An error as plain data, for another process."""
    said = {name: getattr(err, name) for name in _FIELDS}
    return {"kind": type(err).__name__} | {k: v if isinstance(v, str | None) else repr(v) for k, v in said.items()}


def from_plain(plain: dict[str, Any]) -> PrtsError:
    """The error that `to_plain` was given; PrtsError itself stands for a kind that another module defines."""
    kind = globals().get(plain["kind"])
    made = kind if isinstance(kind, type) and issubclass(kind, PrtsError) else PrtsError
    return made(plain["problem"], **{name: plain[name] for name in _FIELDS[1:]})


# The extra of pyproject.toml that brings a package, by the name it is imported by.
EXTRA_OF = {
    package: extra
    for extra, packages in {
        "inference": ("torch", "transformers", "tokenizers", "safetensors", "PIL"),
        "data": ("pyarrow", "polars", "pandera", "av", "h5py", "jinja2", "markupsafe", "matplotlib", "scipy"),
        "train": ("deepspeed", "triton", "huggingface_hub"),
        "lora": ("peft",),
        "nf4": ("bitsandbytes",),
        "tensorboard": ("tensorboard",),
        "sim": ("metaworld", "mujoco"),
        "ray": ("ray",),
        "otel": ("opentelemetry",),
        "serve": ("websockets", "msgpack", "zmq", "prometheus_client", "cryptography"),
        "rlds": ("google", "google_crc32c"),
        "mcap": ("mcap", "mcap_ros2", "mcap_protobuf", "zstandard"),
        "s3": ("s3fs",),
        "gcs": ("gcsfs",),
        "http": ("fsspec", "aiohttp"),
        "pipeline": ("dagster", "dagster_pipes", "mlflow", "dvc", "sqlalchemy"),
    }.items()
    for package in packages
}


def suggest(name: str, allowed: Iterable[str]) -> str:
    """'; did you mean X?' when something in `allowed` is close to `name`, else ''."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def lookup(table: dict, name: str, what: str, cure: str | None = None):
    """`table[name]`, or a ConfigError that lists the names and suggests one. The one registry shape of the project."""
    if name in table:
        return table[name]
    raise ConfigError(
        f"Unknown {what} {name!r}{suggest(name, table)}",
        field=what,
        found=name,
        expected=", ".join(sorted(table)),
        cure=cure,
    )


def install_extra(extra: str) -> str:
    """The cure that brings an extra of pyproject.toml, from the project's folder: no package index has this project."""
    return f"in the project's folder, run `pip install -e '.[{extra}]'`"


def missing_extra(err: ModuleNotFoundError) -> MissingExtraError | None:
    """What to tell where an import failed: none if no extra brings that package."""
    package = (err.name or "").split(".")[0]
    if package not in EXTRA_OF:
        return None
    cure = install_extra(EXTRA_OF[package])
    return MissingExtraError(f"This needs the package {package!r}", found="not installed", cure=cure)


def require(package: str, extra: str):
    """Import an optional `package` or say which extra brings it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as err:
        if err.name is not None and err.name.split(".")[0] != package.split(".")[0]:
            raise
        raise MissingExtraError(
            f"This needs the package {package!r}", found="not installed", cure=install_extra(extra)
        ) from err
