"""Every number of the golden case `normalize` under compat "prts", the corrected value of each defect under "none"."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from prts_core.config.places import shared_folder
from prts_core.contract import Normalization
from prts_core.data.normalize import (
    ACTION,
    STATE,
    STATE_MODE,
    FeatureStats,
    normalize,
    normalize_for_fast,
    to_absolute,
    to_relative,
    unnormalize,
)
from prts_core.data.release_statistics import (
    read_statistics,
    write_norm_stats,
    write_statistics,
)
from prts_core.io.errors import CheckpointError, ContractError, DataError
from prts_core.text.fast import FastTokenizer, dct_coefficients
from prts_core.training.batch import pad_chunk
from tests.data.reference import describe

CASE = shared_folder() / "golden" / "prts" / "normalize"
MODES: tuple[Normalization, ...] = get_args(Normalization)
LIBERO_PANDA = (True,) * 6 + (False,)  # the public release's marks of that embodiment
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason=f"golden case {CASE.name} is not on this machine")


def text_cases() -> dict[str, Any]:
    return json.loads((CASE / "text_cases.json").read_text())


def fast_tokenizer(folder: Path) -> FastTokenizer:
    """The case's BPE as the published processor would lie on disk."""
    settings = text_cases()["fast_tokenizer"]
    record = {name: settings[name] for name in ("scale", "vocab_size", "min_token")}
    folder.mkdir(exist_ok=True)
    (folder / "processor_config.json").write_text(json.dumps(record | {"time_horizon": None, "action_dim": None}))
    (folder / "tokenizer.json").write_bytes((CASE / "fast_tokenizer.json").read_bytes())
    return FastTokenizer.from_published(folder, "prts")


@lru_cache(maxsize=1)
def inputs() -> dict[str, np.ndarray]:
    return load_file(CASE / "inputs.safetensors")


@lru_cache(maxsize=1)
def outputs() -> dict[str, np.ndarray]:
    return load_file(CASE / "outputs.safetensors")


def stats() -> tuple[FeatureStats, FeatureStats]:
    made = read_statistics(CASE / "statistics_quantile.json").dataset().norm_stats()
    return made.state, made.action


def computed(folder: Path) -> dict[str, np.ndarray]:
    """Our value of every output of the case, by its name there."""
    given, (state, action) = inputs(), stats()
    out: dict[str, np.ndarray] = {}
    for mode in MODES:
        coarse = torch.from_numpy(given["action"]).bfloat16().float().numpy()
        normal = normalize(given["action"], action, mode, "prts")
        out[f"{mode}.action_normalized"] = normal
        out[f"{mode}.action_normalized_from_bfloat16"] = normalize(coarse, action, mode, "prts")
        out[f"{mode}.action_roundtrip"] = unnormalize(normal, action, mode, "prts")
        out[f"{mode}.action_unnormalized_from_model"] = unnormalize(given["model_action"], action, mode, "prts")
        out[f"{mode}.state_normalized"] = normalize(given["state"], state, STATE_MODE, "prts")
        out[f"{mode}.state_normalized_if_state_used_this_mode"] = normalize(given["state"], state, mode, "prts")
    for key in (STATE, ACTION):
        found = describe(given[f"population_{key.removeprefix('observation.')}"], "prts")
        out |= {f"stats.{key}.{name}": np.array(values) for name, values in found.to_json().items()}
    for name in ("pad", "pad_same"):
        width = outputs()[f"{name}.action"].shape[-1]
        out[f"{name}.action"], out[f"{name}.dof_mask"] = pad_chunk(given["action"], width)
    relative = to_relative(given["action"], given["state"][0], LIBERO_PANDA)
    out["state_relative.action"] = relative
    out["state_relative.absolute_again"] = to_absolute(relative, given["state"][0], LIBERO_PANDA)
    out["post_process.action"] = normalize(given["action"], action, "QUANTILE", "prts")
    out["post_process.state"] = normalize(given["state"][0], state, STATE_MODE, "prts")
    fast = fast_tokenizer(folder)
    for_fast = normalize_for_fast(given["action"], action, "MEAN_STD", "prts")
    out["fast.quantile_normalized_action"] = for_fast
    out["fast.dct_scaled_rounded"] = dct_coefficients(for_fast[None], fast.scale)[0]
    tokens = fast.encode_many(given["fast_chunks"])
    out["fast.decoded"] = np.stack([fast.decode(t, *given["fast_chunks"].shape[1:]) for t in tokens])
    return out


@needs_case
def test_golden_every_number_is_the_reference_s(tmp_path: Path) -> None:
    ours, wanted = computed(tmp_path), outputs()
    assert set(ours) == set(wanted), "a tensor of the case is not covered"
    for name, value in wanted.items():
        assert ours[name].shape == value.shape, name
        # Values reach 1e7 on constant dimensions: relative only; decoded chunks pass through zero in float64.
        np.testing.assert_allclose(
            ours[name], value, rtol=1e-6, atol=1e-12 if name == "fast.decoded" else 0, err_msg=name
        )
        if value.dtype == np.float32 and not name.startswith("fast.dct"):
            assert ours[name].dtype == np.float32, name


@needs_case
def test_golden_fast_fit_makes_the_reference_s_tokenizer(tmp_path: Path) -> None:
    released = fast_tokenizer(tmp_path)
    settings = text_cases()["fast_tokenizer"]
    made = FastTokenizer.fit(inputs()["fast_fit_chunks"], settings["vocab_size"], settings["scale"], "prts")
    assert (made.min_token, made.scale, made.vocab_size) == (released.min_token, released.scale, released.vocab_size)
    assert made.bpe.get_vocab() == released.bpe.get_vocab()
    assert json.loads(made.bpe.to_str())["model"]["merges"] == json.loads(released.bpe.to_str())["model"]["merges"]


@needs_case
def test_golden_statistics_file_is_read_and_written_back(tmp_path: Path) -> None:
    released = read_statistics(CASE / "statistics_quantile.json")
    write_statistics(tmp_path / "statistics.json", released)
    wanted = json.loads((CASE / "statistics_quantile.json").read_text())
    written = json.loads((tmp_path / "statistics.json").read_text())
    assert written == wanted and list(written["features"]) == list(wanted["features"]), "cameras keep their order"
    assert released.state_mode == wanted["state_mode"] and list(released.datasets) == list(wanted["datasets"])
    write_norm_stats(tmp_path / "norm_stats.json", released.dataset().stats)
    assert json.loads((tmp_path / "norm_stats.json").read_text()) == wanted["stats"]


@needs_case
@pytest.mark.parametrize("mode", MODES)
def test_golden_none_constant_dimensions_stay_finite(mode: Normalization) -> None:
    """The release blows a constant dimension's noise up to 1e7 and calls every frame of it -1 or 0.989."""
    _, action = stats()
    constant = np.flatnonzero(inputs()["population_action"].std(0) < 1e-5)
    assert len(constant), "the case has a constant dimension"
    ours = normalize(inputs()["action"], action, mode)
    theirs = outputs()[f"{mode}.action_normalized"]
    assert (ours[:, constant] == 0).all()
    if mode != "MEAN_STD":  # there it depends on how the constant rounds
        assert np.abs(theirs[:, constant]).max() > 0.9
    moving = np.setdiff1d(np.arange(action.width), constant)
    np.testing.assert_allclose(ours[:, moving], theirs[:, moving], rtol=2e-4, atol=1e-5)
    # Whatever the model says of it, the dimension comes back as its constant.
    back = unnormalize(inputs()["model_action"], action, mode)
    assert np.abs(back[:, constant] - inputs()["population_action"][0, constant]).max() < 1e-5
    np.testing.assert_allclose(
        back[:, moving], outputs()[f"{mode}.action_unnormalized_from_model"][:, moving], rtol=2e-4, atol=1e-5
    )


@needs_case
def test_golden_none_statistics_of_a_constant_are_its_own() -> None:
    population = inputs()["population_action"]
    constant = np.flatnonzero(population.std(0) < 1e-5)
    ours, theirs = describe(population), describe(population, "prts")
    assert (ours.std[constant] < 1e-12).all()
    np.testing.assert_allclose(theirs.std[constant], outputs()["stats.action.std"][constant], rtol=1e-6)
    np.testing.assert_array_equal(ours.mean[constant], population[0, constant].astype(np.float64))


@pytest.mark.parametrize("compat", ["none", "prts"])
def test_non_finite_numbers_are_refused_in_both(compat: Any) -> None:
    some = describe(np.random.default_rng(0).normal(size=(20, 3)))
    for bad in (np.nan, np.inf, -np.inf):
        for call in (normalize, unnormalize, normalize_for_fast):
            with pytest.raises(DataError, match="not finite"):
                call(np.array([0.0, bad, 0.0]), some, "QUANTILE", compat)


def test_for_fast_is_the_plain_normalisation_under_none() -> None:
    some = describe(np.random.default_rng(0).normal(size=(20, 3)))
    values = np.random.default_rng(1).normal(size=(5, 3)) * 1e3
    np.testing.assert_array_equal(normalize_for_fast(values, some, "MEAN_STD"), normalize(values, some, "MEAN_STD"))
    assert np.abs(normalize_for_fast(values, some, "MEAN_STD", "prts")).max() == 50


def test_relative_actions_of_a_batch_and_their_inverse() -> None:
    rng = np.random.default_rng(0)
    actions, state = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 4))
    relative = to_relative(actions, state, (True, False, True))
    np.testing.assert_allclose(relative[1, 2], actions[1, 2] - [state[1, 0], 0, state[1, 2]])
    np.testing.assert_allclose(to_absolute(relative, state, (True, False, True)), actions)
    with pytest.raises(ContractError, match="one mark per action dimension"):
        to_relative(actions, state, (True, False))
    with pytest.raises(ContractError, match="a state dimension for each"):
        to_relative(actions, state[:, :2], (True, False, True))


def entry(width: int) -> dict[str, list[float]]:
    return {name: [0.5] * width for name in ("min", "max", "mean", "std", "q01", "q99")}


def test_released_statistics_of_several_datasets_and_features(tmp_path: Path) -> None:
    one = {"features": {"action": {}}, "stats": {"observation.state": entry(2), "action": entry(3)}}
    two = {
        "features": {"action": {}},
        "stats": {"observation.state.arm": entry(2), "observation.state.hand": entry(1), "action": entry(1)},
    }
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps({"state_mode": "MIN_MAX", **one, "datasets": {"a/one": one, "b/two": two}}))
    released = read_statistics(path)
    assert released.dataset().norm_stats().action.width == 3, "the first stands for all"
    assert released.dataset("b/two").norm_stats().state.width == 3, "several features are joined"
    with pytest.raises(ValueError, match="did you mean 'b/two'"):
        released.dataset("b/twoo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_mode": "QUANTILES"}, "state_mode"),
        ({"datasets": {"a": 3}}, "datasets.a"),
        ({"datasets": {"a": {"features": {"x": {}}, "stats": {"action": {"min": [1.0]}}}}}, "datasets.a.stats.action"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = {"state_mode": "QUANTILE", "features": {"x": {}}, "stats": {"action": entry(1)}}
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(good | change))
    with pytest.raises((CheckpointError, DataError), match=message):
        read_statistics(path)
