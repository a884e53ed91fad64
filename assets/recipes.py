"""Name what belongs to one recipe on Dagster's page: keys, partitions, its plan. Several recipes share one page.

$PRTS_RECIPE names them, separated by commas. Dagster starts to look at YAML here; it runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dagster as dg

from prts_core.config.load import RunPlan, load_plan
from prts_core.config.places import recipe_paths
from prts_core.delivery.regression import names
from prts_core.io.errors import ConfigError
from prts_core.stages.declarations import STAGES, steps
from prts_core.store.sources import external_source
from prts_core.store.stage import Stage

SUITE, VERSION = "suite", "version"  # dimensions of the asset `regression`


@dataclass(frozen=True)
class RecipePage:
    """One recipe as Dagster sees it."""

    plan: RunPlan

    @property
    def name(self) -> str:
        return self.plan.recipe.name

    @property
    def identifier(self) -> str:
        """The recipe's name where Dagster takes only letters, digits and underscores: steps, jobs, resources."""
        return re.sub(r"\W", "_", self.name)

    @property
    def resource(self) -> str:
        """Name of the resource that holds the plan; its configuration on the launchpad changes the recipe's values."""
        return f"plan_{self.identifier}"

    def key(self, asset: str) -> dg.AssetKey:
        return dg.AssetKey([self.name, asset])

    def group(self, room: str) -> str:
        """Group on the page: nodes of the graph show only the last part of a key, so that groups tell the recipes."""
        return f"{self.identifier}_{room}"

    @property
    def stages(self) -> list[Stage]:
        """The stages that the recipe goes through."""
        used = {name for name, _ in steps(self.plan)}
        return [stage for name, stage in STAGES.items() if name in used]

    @cached_property
    def datasets(self) -> dg.StaticPartitionsDefinition:
        return dg.StaticPartitionsDefinition(list(self.plan.datasets))

    @cached_property
    def external(self) -> dg.StaticPartitionsDefinition | None:
        """Datasets that were made elsewhere; none where all are recorded here."""
        found = [name for name in self.plan.datasets if external_source(self.plan, name) is not None]
        return dg.StaticPartitionsDefinition(found) if found else None

    @cached_property
    def versions(self) -> dg.DynamicPartitionsDefinition:
        """Registered versions of the recipe's model, added as they are registered."""
        return dg.DynamicPartitionsDefinition(name=f"versions_of_{self.plan.recipe.register.model_name}")

    @cached_property
    def measured(self) -> dg.MultiPartitionsDefinition:
        """Suites x versions: the partitions of the asset `regression`."""
        suites = dg.StaticPartitionsDefinition(list(names(self.plan)))
        return dg.MultiPartitionsDefinition({SUITE: suites, VERSION: self.versions})


def recipe_pages(paths: Sequence[Path] | None = None) -> list[RecipePage]:
    """Read the recipes; by default those of $PRTS_RECIPE. ConfigError where two of them have one name."""
    pages: dict[str, RecipePage] = {}
    for path in paths or recipe_paths():
        page = RecipePage(load_plan(path))
        for other in pages.values():
            if other.identifier == page.identifier:
                raise ConfigError(
                    f"Two recipes are called {page.name!r}",
                    file=path,
                    field="name",
                    found=str(other.plan.path),
                    cure=f"give one of them another `name`, or leave it out: PRTS_RECIPE={path}",
                )
        pages[page.name] = page
    return list(pages.values())
