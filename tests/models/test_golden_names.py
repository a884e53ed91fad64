"""Names and shapes at 4B, on the meta device, against the lists of the public implementation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prts_core.config.load import read_model
from prts_core.models.prts import PrtsModel
from tests.models.golden_case import golden_folder

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
TIED = "lm_head.weight"


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def variants() -> list[str]:
    try:
        return sorted(path.stem for path in golden_folder("param_names_4b").glob("*.txt"))
    except pytest.skip.Exception:
        return ["absent"]


@pytest.fixture(scope="module", params=variants())
def variant(request) -> str:
    golden_folder("param_names_4b")
    return request.param


def test_golden_names_and_shapes_at_4b(variant):
    folder = golden_folder("param_names_4b")
    facts = json.loads((folder / "summary.json").read_text())[variant]
    wanted = {}
    for line in (folder / f"{variant}.txt").read_text().splitlines():
        name, shape, *_ = line.split("\t")
        wanted[name] = tuple(json.loads(shape))
    assert wanted.pop(TIED) == wanted["language_model.embed_tokens.weight"]

    recipe = CONFIGS / ("prts_4b_dit.yaml" if variant.startswith("dit") else "prts_4b.yaml")
    config = read_model(recipe)[0]
    if "crl" not in variant:
        config = replace(config, contrastive=None)
    if not variant.startswith(("mot", "dit")):
        config = replace(config, expert=None)
    with torch.device("meta"):
        model = PrtsModel(config, facts["vocab_size"], image_token_id=0)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == wanted
    assert parameters(model) == facts["total_params"]
    for module, count in facts["params_by_top_module"].items():
        part = getattr(model, module)
        assert (part.numel() if isinstance(part, torch.Tensor) else parameters(part)) == count


def test_golden_position_table_grows_with_the_chunk():
    rows = json.loads((golden_folder("param_names_4b") / "summary.json").read_text())["position_embedding_rows"]
    recipe = CONFIGS / "prts_4b.yaml"
    for name, shape in rows.items():
        config = replace(read_model(recipe)[0], chunk_length=int(name.removeprefix("chunk")))
        with torch.device("meta"):
            model = PrtsModel(config, 8, image_token_id=0)
        assert list(model.dit_action_head.position_embedding.weight.shape) == shape
