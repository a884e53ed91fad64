"""A policy folder: reloads to the same actions, refuses what does not fit, draws noise from seeds alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from prts_core.config.model import MotConfig, TokensConfig
from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.data.normalize import FeatureStats, NormStats
from prts_core.io.errors import CheckpointError, ConfigError, ContractError, DataError
from prts_core.io.files import digest_file, read_json, write_json
from prts_core.models.heads.tokens.loss import bin_values
from prts_core.models.prts import PrtsModel
from prts_core.policy.observation import STATE, UnderWay
from prts_core.policy.policy import (
    Policy,
    load_policy,
    policy_digest,
    policy_files,
    save_policy,
    untrained_policy,
)
from prts_core.policy.processor import FILES, Processor, load_statistics
from prts_core.rollout.local_policy import LocalPolicy, neighbours_matter
from prts_core.text import prompt
from prts_core.text.collate import collate, patches
from prts_core.text.sequence import Sample

KEYS = ("observation.images.top", "observation.images.wrist")


@pytest.fixture
def processor(tmp_path, tiny, tokenizer, fast) -> Processor:
    def stats(width: int) -> FeatureStats:
        one = np.ones(width)
        return FeatureStats(mean=0 * one, std=one, min=-2 * one, max=2 * one, q01=-one, q99=one)

    path = tmp_path / "norm_stats.json"
    write_json(path, NormStats(stats(3), stats(3), 10, "train", "sha256:x").to_json())
    dims = tuple(Dimension(name, "m") for name in "xyz")
    contract = Contract(
        "toy", 20, dims, dims, (Camera(KEYS[0], "Camera top", 32, 32), Camera(KEYS[1], "Camera wrist", 32, 32))
    )
    return Processor(
        PolicyContract("toy", contract, tiny.chunk_length, "QUANTILE", digest_file(path)),
        load_statistics(path),
        path,
        tokenizer,
        fast,
        tiny,
    )


@pytest.fixture
def folder(tmp_path, model, tiny, processor):
    out = tmp_path / "policy"
    save_policy(out, model.state_dict(), tiny, processor)
    return out


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    images = {key: rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8) for key in KEYS}
    state = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
    return images | {STATE: state}, ["open the faucet", "close the faucet"]


def test_a_reloaded_policy_acts_alike(folder, model, processor, inputs):
    ours, theirs = Policy(model, processor), load_policy(folder)
    chunk = ours.act(*inputs, seeds=[1, 2])
    assert chunk.shape == (2, 4, 3) and chunk.dtype == np.float32 and np.isfinite(chunk).all()
    assert np.array_equal(chunk, theirs.act(*inputs, seeds=[1, 2]))
    value = ours.value(inputs[0], chunk, inputs[1])
    assert value.shape == (2,) and np.array_equal(value, theirs.value(inputs[0], chunk, inputs[1]))


@pytest.mark.parametrize("single", [False, True])
def test_of_several_draws_the_one_of_the_highest_value_is_given(model, processor, inputs, single):
    """Each draw is what the network makes of that noise, and its value what `value` says of it."""
    policy, (observation, texts) = Policy(model, processor), inputs
    if single:
        observation, texts = {key: array[0] for key, array in observation.items()}, texts[0]
    seeds = 1 if single else [1, 2]
    answer = policy.answer(observation, texts, seeds, draws=6)
    one = policy.answer(observation, texts, seeds, value=True)
    assert answer.actions.shape == one.actions.shape and answer.values is not None and one.values is not None
    assert not np.array_equal(answer.actions, one.actions)
    np.testing.assert_allclose(answer.values, policy.value(observation, answer.actions, texts), atol=1e-5)
    many = [policy.answer(observation, texts, seed if single else [seed] * 2, value=True).values for seed in range(30)]
    assert (answer.values > np.median(many, axis=0)).all()


def test_a_policy_without_chance_has_nothing_to_choose_from(tiny, processor, model, inputs):
    assert isinstance(tiny.expert, MotConfig)
    model.config = replace(tiny, expert=replace(tiny.expert, noise_scale=0.0))
    with pytest.raises(ConfigError, match="alike at every draw"):
        Policy(model, processor).answer(*inputs, seeds=[1, 2], draws=2)


def test_a_policy_of_tokens_acts_and_reloads(tmp_path, tiny, tokenizer, processor, inputs):
    """Its actions are bins of the normalised range, whatever the seed; its value is read as ever."""
    torch.manual_seed(0)
    config = replace(tiny, expert=TokensConfig(bins=16))
    network = PrtsModel(config, len(tokenizer), tokenizer.id(prompt.IMAGE_PAD))
    processor = replace(processor, model=config)
    save_policy(tmp_path / "tokens", network.state_dict(), config, processor)
    ours, theirs = Policy(network, processor), load_policy(tmp_path / "tokens")
    assert theirs.model.config == config
    chunk = ours.act(*inputs, seeds=[1, 2])
    assert chunk.shape == (2, 4, 3) and np.array_equal(chunk, theirs.act(*inputs, seeds=[3, 4]))
    values = bin_values(16).numpy()
    assert (np.abs(chunk[..., None] - values).min(-1) < 1e-5).all()  # q01 -1 and q99 1: robot units are normalised ones
    alone = theirs.act({k: v[:1] for k, v in inputs[0].items()}, inputs[1][:1], seeds=[1])
    np.testing.assert_allclose(alone[0], chunk[0], atol=1e-5)
    assert theirs.value(inputs[0], chunk, inputs[1]).shape == (2,)
    assert np.isfinite(load_policy(tmp_path / "tokens", dtype="bf16").act(*inputs, seeds=[1, 2])).all()


def test_noise_comes_from_the_seed_and_a_neighbour_does_not_matter(folder, inputs):
    policy = load_policy(folder)
    seen, text = inputs
    both = policy.act(seen, text, seeds=[1, 2])
    again = policy.act(seen, text, seeds=[1, 3])
    assert np.array_equal(both[0], again[0]) and not np.allclose(both[1], again[1])
    alone = policy.act({k: v[:1] for k, v in seen.items()}, text[:1], seeds=[1])
    np.testing.assert_allclose(alone[0], both[0], atol=1e-4)


def test_without_a_batch_axis_in_there_is_none_out(folder, inputs):
    policy = load_policy(folder)
    seen, _ = inputs
    one = {key: array[0] for key, array in seen.items()}
    chunk = policy.act(one, "open the faucet", seeds=1)
    assert chunk.shape == (4, 3)
    batch = {key: array[:1] for key, array in seen.items()}
    assert np.array_equal(chunk, policy.act(batch, ["open the faucet"], [1])[0])
    value = policy.value(one, chunk, "open the faucet")
    assert np.ndim(value) == 0 and value == policy.value(batch, chunk[None], "open the faucet")[0]


def test_one_sentence_serves_a_whole_batch(folder, inputs):
    policy = load_policy(folder)
    seen, _ = inputs
    text = "close the faucet"
    assert np.array_equal(policy.act(seen, text, [1, 2]), policy.act(seen, [text, text], [1, 2]))


def test_the_sentence_matters(folder, inputs):
    policy = load_policy(folder)
    left, right = (policy.act(inputs[0], text, seeds=[1, 1]) for text in ("open the faucet", "close the faucet"))
    assert not np.allclose(left, right)


def test_untrained_is_the_same_network_with_other_weights(folder, inputs):
    assert not np.allclose(
        untrained_policy(folder, 0).act(*inputs, seeds=[1, 2]), load_policy(folder).act(*inputs, seeds=[1, 2])
    )
    assert np.array_equal(
        untrained_policy(folder, 3).act(*inputs, [1, 2]), untrained_policy(folder, 3).act(*inputs, [1, 2])
    )


def test_bad_input_is_named(folder, inputs):
    policy = load_policy(folder)
    seen, text = inputs
    two = [0, 0]
    faults = {
        "wrong width": seen | {STATE: seen[STATE][:, :2]},
        "not finite": seen | {STATE: seen[STATE] * np.nan},
        r"camera is missing.*did you mean.*images\.wrists.*images\.wrist": {
            STATE: seen[STATE],
            KEYS[0]: seen[KEYS[0]],
            "observation.images.wrists": seen[KEYS[1]],
        },
        r"The state is missing.*Expected: observation\.state": {key: seen[key] for key in KEYS},
        r"image has the wrong form.*float32.*uint8 \(B, H, W, 3\)": seen | {KEYS[0]: seen[KEYS[0]].astype(np.float32)},
        r"wrong form.*\(32, 32, 3\).*a batch axis": seen | {KEYS[0]: seen[KEYS[0]][0]},
        "disagree on the batch": seen | {KEYS[0]: seen[KEYS[0]][:1]},
        "state has the wrong form": seen | {STATE: seen[STATE][None]},
    }
    for said, wrong in faults.items():
        with pytest.raises(DataError, match=said):
            policy.act(wrong, text, two)
    with pytest.raises(DataError, match="not one instruction for each sample"):
        policy.act(seen, text[:1], two)
    with pytest.raises(DataError, match="not one seed"):
        policy.act(seen, text, [0])
    with pytest.raises(DataError, match="wrong width"):
        policy.value(seen, np.zeros((2, 4, 2), np.float32), text)
    with pytest.raises(DataError, match=r"do not fit their observation.*\(4, 3\).*\(2, T, A\)"):
        policy.value(seen, np.zeros((4, 3), np.float32), text)


@pytest.mark.parametrize("name", ("config.json", "model.safetensors", *FILES))
def test_every_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"missing {name}"):
        load_policy(folder)


def test_foreign_statistics_are_refused(folder):
    raw = read_json(folder / "norm_stats.json")
    raw["norm_stats"]["action"]["q99"][0] = 9.0
    write_json(folder / "norm_stats.json", raw)
    with pytest.raises(CheckpointError, match="not those the policy was trained with"):
        load_policy(folder)


def test_a_truncated_weight_file_is_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_policy(folder)


def test_the_digest_covers_what_decides_and_nothing_else(folder, model, tiny, processor):
    before = policy_digest(folder)
    (folder / "README.md").write_text("a card")
    assert policy_digest(folder) == before
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["crl_logit_scale"] += 1
    save_policy(folder, weights, tiny, processor)
    assert policy_digest(folder) != before


def test_a_dataset_of_another_contract_is_refused(processor, tmp_path):
    from types import SimpleNamespace

    from prts_core.training.datasets import RobotDataset

    meant = processor.contract.contract
    other = Contract(meant.embodiment, 30, meant.state, meant.action, meant.cameras)
    with pytest.raises(ContractError, match=r"control_hz: 30\.0 in dataset toy, 20\.0 in policy"):
        RobotDataset("toy", SimpleNamespace(contract=other), None, processor, [0])  # type: ignore[arg-type]


def test_state_relative_actions_are_absolute_outside(processor, model, inputs):
    meant = processor.contract.contract
    contract = replace(meant, action=(*meant.action[:1], Dimension("y", "m", True), *meant.action[2:]))
    relative = replace(processor, contract=replace(processor.contract, contract=contract))
    state = inputs[0][STATE]
    chunks = np.random.default_rng(3).normal(size=(2, 4, 3)).astype(np.float32)
    inward = relative.normalize_actions(chunks, state)
    assert np.allclose(inward[..., 1], chunks[..., 1] - state[:, None, 1], atol=1e-6)  # q01, q99 are -1 and 1
    assert np.array_equal(inward[..., [0, 2]], processor.normalize_actions(chunks, state)[..., [0, 2]])
    assert np.allclose(relative.unnormalize_actions(inward, state), chunks, atol=1e-6)
    # the same network, the same noise: the policy's relative dimension comes back on top of the state
    plain, moved = (
        Policy(model, processor).act(*inputs, seeds=[1, 2]),
        Policy(model, relative).act(*inputs, seeds=[1, 2]),
    )
    assert np.allclose(moved[..., 1] - plain[..., 1], state[:, None, 1], atol=1e-6)
    assert np.array_equal(moved[..., [0, 2]], plain[..., [0, 2]])


def test_weights_are_loaded_without_gradients_left_on(folder, inputs):
    policy = load_policy(folder)
    policy.act(*inputs, seeds=[0, 0])
    assert all(p.grad is None for p in policy.model.parameters()) and not torch.is_inference_mode_enabled()


def test_a_policy_in_shards_is_the_same_policy(folder, tmp_path, model, tiny, processor, inputs):
    """Large weights lie in shards; the digest covers every one of them, and a lost one is named."""
    out = tmp_path / "sharded"
    save_policy(out, model.state_dict(), tiny, processor, max_shard_bytes=50_000)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (out / "model.safetensors").exists()
    assert {*policy_files(out)} >= {"model.safetensors.index.json", *(s.name for s in shards)}
    assert np.array_equal(load_policy(out).act(*inputs, seeds=[1, 2]), load_policy(folder).act(*inputs, seeds=[1, 2]))
    before = policy_digest(out)
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"\0")
    assert policy_digest(out) != before
    shards[0].unlink()
    with pytest.raises(CheckpointError, match=shards[0].name):
        load_policy(out)


# ---- precision -----------------------------------------------------------------------------------------------------
def test_bf16_is_near_fp32_and_the_value_nearer(folder, inputs):
    exact, half = load_policy(folder), load_policy(folder, "bf16")
    assert (exact.dtype, half.dtype) == ("fp32", "bf16")
    chunk, values = exact.act_and_value(*inputs, seeds=[1, 2])
    other, nats = half.act_and_value(*inputs, seeds=[1, 2])
    assert other.dtype == nats.dtype == np.float32
    assert 0 < np.abs(other - chunk).max() < 0.05 * np.abs(chunk).max()
    kept = half.value(inputs[0], chunk, inputs[1])  # of the same actions
    assert 0 < np.abs(kept - values).max() < 0.02 * exact.model.log_scale.exp().item()


def test_what_needs_digits_stays_in_fp32(folder):
    exact, half = load_policy(folder), load_policy(folder, "bf16")
    for name, parameter in half.model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith("crl_") else torch.bfloat16), name
    mine, theirs = dict(exact.model.named_buffers()), dict(half.model.named_buffers())
    assert mine and all(torch.equal(mine[name], theirs[name]) for name in mine), "rotary frequencies"


def test_the_flow_is_integrated_in_fp32(folder, inputs):
    half, seen = load_policy(folder, "bf16"), []
    velocity = half.model.velocity
    half.model.velocity = lambda prefix, x, *more: seen.append(x) or velocity(prefix, x, *more)
    half.act(*inputs, seeds=[1, 2])
    assert len(seen) == 4 and all(x.dtype == torch.float32 for x in seen)
    assert not torch.equal(seen[-1], seen[-1].bfloat16().float())


def test_an_untrained_policy_is_one_network_in_any_precision(folder):
    exact, half = untrained_policy(folder, 3), untrained_policy(folder, 3, "bf16")
    for (name, one), other in zip(exact.model.named_parameters(), half.model.parameters(), strict=True):
        assert torch.equal(one.to(other.dtype), other), name
    assert half.dtype == "bf16"


# ---- one encoding ------------------------------------------------------------------------------------------------
def read_in_one_go(policy: Policy, seen, actions, texts) -> np.ndarray:
    """The value of whole sequences, prompt and contrastive parts together, as training reads them."""
    processor, model = policy.processor, policy.model
    states = processor.builder.encode_states(processor.state_bins(seen[STATE]))
    parts = zip(states, texts, processor.fast_tokens(actions, seen[STATE]), strict=True)
    whole = [processor.builder.sequence(Sample(*own), response=False, contrastive=True) for own in parts]
    vision = processor.model.vision
    tokens = collate(whole, *patches(processor.images(seen), vision.patch_size, vision.merge_size))
    with torch.inference_mode():
        encoded = model.encode(tokens)
        phi, psi = model.embed_state_actions(encoded), model.embed_goals(encoded)
        return (model.log_scale.exp() * (phi * psi).sum(-1)).numpy()


@pytest.mark.parametrize("compat", ["none", "prts"])
def test_the_value_is_that_of_the_whole_sequence(model, processor, inputs, compat, monkeypatch):
    monkeypatch.setattr(model, "compat", compat)
    policy = Policy(model, replace(processor, compat=compat))
    seen, texts = inputs
    texts = [texts[0], "press"]  # of unequal length: one of them is padded
    chunk = policy.act(seen, texts, [1, 2])
    whole = read_in_one_go(policy, seen, chunk, texts)
    np.testing.assert_allclose(policy.value(seen, chunk, texts), whole, atol=2e-6)
    alone = policy.value({k: v[1:] for k, v in seen.items()}, chunk[1:], texts[1:])
    np.testing.assert_allclose(alone, whole[1:], atol=2e-6)


def test_no_bit_depends_on_who_waits_beside_it(model, processor):
    """On one thread, as benchmarks ask: states and actions of other lengths stand in the same batch."""
    policy = LocalPolicy(Policy(model, processor), {}, batch=4, threads=1)
    assert neighbours_matter(policy, ["open the faucet", "close the faucet"]) == ""


@pytest.mark.parametrize("subtasks", [False, True])
def test_act_and_value_look_once(model, processor, inputs, subtasks):
    policy = Policy(model, replace(processor, subtasks=subtasks))
    expected = policy.act(*inputs, seeds=[1, 2])
    values = policy.value(inputs[0], expected, inputs[1])
    calls: list[tuple[str, int]] = []
    watched = [model.visual, model.language_model]
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: calls.append(
                (type(m).__name__, kwargs.get("inputs_embeds", torch.empty(0)).numel())
            ),
            with_kwargs=True,
        )
        for module in watched
    ]
    chunk, both = policy.act_and_value(*inputs, seeds=[1, 2])
    for hook in hooks:
        hook.remove()
    assert np.array_equal(chunk, expected)
    np.testing.assert_allclose(both, values, atol=2e-6)
    assert [name for name, _ in calls].count("Qwen3VLVisionModel") == 1
    read = [size for name, size in calls if name == "Qwen3VLTextModel"]
    assert len(read) == 2 or subtasks, "the prompt, then what comes with the actions"
    assert all(size < read[0] for size in read[1:])


# ---- subtasks ----------------------------------------------------------------------------------------------------
@pytest.fixture
def speaking(model, processor) -> Policy:
    return Policy(model, replace(processor, subtasks=True))


def test_a_policy_speaks_then_acts_on_its_own_words(speaking, inputs):
    said = speaking.subtask(*inputs)
    assert len(said) == 2 and all(" " <= letter <= "~" for words in said for letter in words)
    own = speaking.act(*inputs, seeds=[1, 2])
    mute = speaking.act(*inputs, seeds=[1, 2], subtask="press the button")
    assert own.shape == mute.shape and not np.allclose(own, mute), "the words reach the action head"
    single = {k: v[0] for k, v in inputs[0].items()}
    assert speaking.subtask(single, inputs[1][0]) == said[0]


def test_a_policy_without_subtasks_says_so(folder, inputs, speaking, tmp_path, tiny):
    silent = load_policy(folder)
    with pytest.raises(DataError, match="does not reason in subtasks"):
        silent.subtask(*inputs)
    with pytest.raises(DataError, match="does not reason in subtasks"):
        silent.act(*inputs, seeds=[1, 2], subtask="press the button")
    save_policy(tmp_path / "speaking", speaking.model.state_dict(), tiny, speaking.processor)
    assert load_policy(tmp_path / "speaking").subtask(*inputs) == speaking.subtask(*inputs)


def under_way(rows: np.ndarray, delay: list[int], executed: list[int]) -> UnderWay:
    return UnderWay(rows, np.array(delay), np.array(executed))


@pytest.mark.parametrize("given_rows", [0, 2])  # guided; trained
def test_an_answer_goes_on_from_the_chunk_under_way(given_rows: int, folder, model, processor, inputs):
    """Rows that are executed meanwhile come back to the bit; a robot that stands still gets what it always gets."""
    model.config = replace(model.config, expert=replace(model.config.expert, given_rows=given_rows))
    policy = Policy(model, processor)
    plain = policy.act(*inputs, seeds=[1, 2])
    old = np.random.default_rng(1).uniform(-0.5, 0.5, plain.shape).astype(np.float32)
    made = policy.answer(*inputs, seeds=[1, 2], under_way=under_way(old, [2, 0], [2, 4])).actions
    assert np.array_equal(made[0, :2], old[0, :2])
    assert not np.allclose(made[0, 2:], plain[0, 2:], atol=1e-5)
    assert np.allclose(made[1], plain[1], atol=1e-5)
    again = policy.answer(*inputs, seeds=[1, 2], under_way=under_way(old, [2, 0], [2, 4])).actions
    assert np.array_equal(made, again)
    with pytest.raises(ConfigError, match="too short for real-time chunking"):
        policy.answer(*inputs, seeds=[1, 2], under_way=under_way(old, [3, 0], [3, 4]))


def test_whom_one_is_answered_together_with_does_not_matter(model, processor, inputs):
    """A robot whose rows were trained for, one whose delay is beyond them, in one batch and alone."""
    model.config = replace(model.config, expert=replace(model.config.expert, given_rows=1))
    policy = Policy(model, processor)
    old = np.random.default_rng(1).uniform(-0.5, 0.5, (2, 4, 3)).astype(np.float32)
    both = policy.answer(*inputs, seeds=[1, 2], under_way=under_way(old, [1, 2], [1, 2])).actions
    for row, delay in ((0, 1), (1, 2)):
        seen = {key: array[row : row + 1] for key, array in inputs[0].items()}
        alone = policy.answer(
            seen, [inputs[1][row]], [row + 1], under_way=under_way(old[row : row + 1], [delay], [delay])
        ).actions
        np.testing.assert_allclose(both[row], alone[0], atol=1e-5)
