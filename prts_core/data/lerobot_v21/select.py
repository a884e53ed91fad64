"""Choose, join and rename the columns and cameras of a foreign LeRobot dataset that become state, action and views.

Where the choice is what a dataset already has, its tables stay byte for byte as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prts_core.config.sources import LeRobotSource
from prts_core.data.lerobot_v21.schema import ACTION, STATE, Feature, Info
from prts_core.data.lerobot_v21.tables import column_array
from prts_core.io.errors import ConfigError, DataError, suggest


@dataclass(frozen=True)
class Selection:
    """state, action: columns that are laid side by side; cameras: those kept; dropped: features left out."""

    state: tuple[str, ...]
    action: tuple[str, ...]
    cameras: tuple[str, ...]
    dropped: frozenset[str]

    @property
    def joins(self) -> dict[str, tuple[str, ...]]:
        """State and action where they are not the column of that name: new name -> columns."""
        return {new: parts for new, parts in ((STATE, self.state), (ACTION, self.action)) if parts != (new,)}

    @property
    def rewrites_tables(self) -> bool:
        return bool(self.joins or self.dropped)

    def info(self, info: Info) -> Info:
        """info.json's features as they are after the selection; joined columns keep their names in order."""
        features: dict[str, Feature] = {}
        for key, feature in info.features.items():
            new = STATE if key in self.state else ACTION if key in self.action else None
            if new in self.joins:
                features.setdefault(new, _joined([info.features[part] for part in self.joins[new]], self.joins[new]))
            elif key not in self.dropped:
                features[key] = feature
        return info.model_copy(update={"features": features})

    def table(self, table: pa.Table, path: Path) -> pa.Table:
        """An episode's table with joined columns under the names state and action, and without what is dropped."""
        table = table.replace_schema_metadata(None)  # Hugging Face's own list of the columns would be wrong
        table = table.drop_columns([key for key in self.dropped if key in table.column_names])
        for new, parts in self.joins.items():
            arrays = [column_array(table.column(part), path, part) for part in parts]
            values = np.concatenate([a.reshape(len(a), -1).astype(np.float32, copy=False) for a in arrays], axis=1)
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
            place = min(table.column_names.index(part) for part in parts)
            table = table.drop_columns([part for part in parts if part in table.column_names])
            table = table.add_column(min(place, table.num_columns), new, column.cast(pa.list_(pa.float32())))
        return table

    def stats(self, stats: dict[str, Any]) -> dict[str, Any]:
        """One episode's statistics after the selection."""
        out = {key: value for key, value in stats.items() if key not in self.dropped}
        for new, parts in self.joins.items():
            if all(part in stats for part in parts):
                names = ("min", "max", "mean", "std")
                whole = {name: [x for part in parts for x in stats[part][name]] for name in names}
                for part in parts:
                    out.pop(part, None)
                out[new] = whole | {"count": stats[parts[0]]["count"]}
        return out


def select(info: Info, source: LeRobotSource, root: Path) -> Selection:
    """The choice of `source`; by default observation.state (else every column that begins so), action, all cameras.

    Raises ConfigError for a key that the dataset does not have, DataError where there is no state or action vector.
    """
    where = root / "meta" / "info.json"
    numbers = [key for key, feature in info.features.items() if not feature.is_image]
    states = [STATE] if STATE in numbers else [key for key in numbers if key.startswith(STATE)]
    chosen = {
        "select_state": tuple(states) if source.select_state is None else source.select_state,
        "select_action": (ACTION,) if source.select_action is None else source.select_action,
        "select_video": tuple(info.camera_keys) if source.select_video is None else source.select_video,
    }
    for field, keys in chosen.items():
        allowed = info.camera_keys if field == "select_video" else numbers
        wrong = partial(ConfigError, file=where, field=field)
        unknown = [key for key in keys if key not in allowed]
        if unknown and getattr(source, field) is not None:
            problem = f"A selected key is not in the dataset{suggest(unknown[0], allowed)}"
            raise wrong(problem, found=unknown[0], expected=", ".join(allowed))
        if len(set(keys)) != len(keys):
            raise wrong("A key is selected twice", found=", ".join(keys))
    for name, keys in ((STATE, chosen["select_state"]), (ACTION, chosen["select_action"])):
        unfit = [key for key in keys if key not in numbers or len(info.features[key].shape) != 1]
        if not keys or unfit:
            vector = bool(unfit) and unfit[0] in numbers
            raise DataError(
                "A dataset needs one state and one action vector",
                file=where,
                field=f"features.{(unfit or [name])[0]}",
                found=str(info.features[unfit[0]].shape) if vector else ", ".join(info.features),
                expected=f"{name} of shape (n,), or columns chosen with source.select_state and select_action",
            )
    used = {*chosen["select_state"], *chosen["select_action"]}
    replaced = {key for key in (STATE, ACTION) if key in numbers} - used  # a join takes its name
    lost = {key for key in info.camera_keys if key not in chosen["select_video"]}
    return Selection(
        chosen["select_state"], chosen["select_action"], chosen["select_video"], frozenset(replaced | lost)
    )


def _joined(features: list[Feature], keys: tuple[str, ...]) -> Feature:
    names: list[str] = []
    full: list[str] = []  # with the column's key: two grippers may both call it "gripper"
    for feature, key in zip(features, keys, strict=True):
        named, short = feature.dimension_names, key.removeprefix("observation.")
        numbers = [f"_{i}" for i in range(len(named))] if len(named) > 1 else [""]
        names += [name or short + number for name, number in zip(named, numbers, strict=True)]
        full += [f"{key}.{name or i}" for i, name in enumerate(named)]
    return Feature(dtype="float32", shape=(len(names),), names=names if len(set(names)) == len(names) else full)
