"""Checkpoint folders of others: both layouts load, what is broken in them is named, what we save loads again."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3VLForConditionalGeneration

from prts_core.config.checked_yaml import check
from prts_core.config.model import ContrastiveConfig, DitConfig, ModelConfig, MotConfig, TextConfig, VisionConfig
from prts_core.io.errors import CheckpointError
from prts_core.io.tensors import load_sharded, load_weights, save_sharded
from prts_core.models.backbone import qwen3vl_config
from prts_core.models.prts import PrtsModel
from prts_core.models.stock import stock_tokens
from prts_core.release.checkpoint import (
    fetch,
    load_backbone,
    load_released,
    read_released,
    released_network,
    resolve_pretrained,
)

VOCABULARY, IMAGE, VIDEO = 40, 33, 34


@pytest.fixture(scope="module")
def shapes() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            depth=2,
            hidden_size=16,
            num_heads=2,
            intermediate_size=24,
            patch_size=4,
            num_position_embeddings=16,
            deepstack_indexes=(0,),
        ),
        text=TextConfig(
            hidden_size=24,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=32,
            mrope_section=(2, 1, 1),
        ),
        expert=MotConfig(hidden_size=16, num_heads=2, intermediate_size=8, dropout=0.2),
        contrastive=ContrastiveConfig(hidden_size=12, embed_dim=6),
        chunk_length=4,
        max_action_dim=5,
    )


@pytest.fixture
def network(shapes) -> PrtsModel:
    torch.manual_seed(0)
    model = PrtsModel(shapes, VOCABULARY, IMAGE, "prts", VIDEO)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if name.startswith("language_model.") and name.endswith("norm.weight"):
            parameter.data = parameter.data.bfloat16().float()
    return model.eval()


def released_json(shapes: ModelConfig) -> dict:
    """config.json as the public code writes it, for these shapes."""
    text, vision = shapes.text, shapes.vision
    return {
        "model_type": "prts_qwen3_vl",
        "action_chunk_size": 4,
        "max_action_dim": 5,
        "num_denoise_steps": 4,
        "crl_loss_weight": 0.0,
        "crl_embed_dim": 6,
        "crl_repr_norm": True,
        "golden_overrides": {"mot_hidden_size": 16, "mot_num_attention_heads": 2, "crl_hidden_dim": 12},
        "dit_action_head_config": {
            "use_mot_action_expert": True,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 6,
            "output_dim": 10,
            "mlp_mult": 4,
            "use_alternate_vl_dit": True,
            "attend_text_every_n_blocks": 2,
            "dropout": 0.2,
            "final_dropout": True,
            "noise_beta_alpha": 1.5,
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": 35,
        "vision_end_token_id": 36,
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": VOCABULARY,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            "intermediate_size": text.intermediate_size,
            "rope_theta": text.rope_theta,
            "hidden_act": "silu",
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
            "action_start_token_id": 37,
            "action_token_id": 38,
            "action_end_token_id": None,
        },
        "vision_config": {
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "num_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": text.hidden_size,
        },
    }


@pytest.fixture
def folder(tmp_path, shapes, network):
    (tmp_path / "config.json").write_text(json.dumps(released_json(shapes)))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def change(folder, **fields) -> None:
    """Set fields of config.json; a dotted path is written with two underscores."""
    raw = json.loads((folder / "config.json").read_text())
    for path, value in fields.items():
        *parents, last = path.split("__")
        section = raw
        for parent in parents:
            section = section[parent]
        section[last] = value
    (folder / "config.json").write_text(json.dumps(raw))


def same(model: PrtsModel, other: PrtsModel) -> None:
    left, right = model.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_released_layout_loads(folder, network, shapes):
    model, released = load_released(folder)
    same(model, network)
    assert replace(model.config, name=shapes.name) == shapes
    assert model.compat == "prts" and not model.training
    assert (released.tokens.image, released.tokens.action_pad, released.tokens.action_end) == (IMAGE, 38, None)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_both_prefixes_a_written_head_and_shards(folder, network, prefix, head, shards):
    weights = {(prefix if n.startswith(("visual.", "language_model.")) else "") + n: t for n, t in _weights(network)}
    if head:
        weights["lm_head.weight"] = network.language_model.embed_tokens.weight.detach().clone()
    (folder / "model.safetensors").unlink()
    save_sharded(folder, weights, max_bytes=4000 if shards else 10**9)
    assert (folder / "model.safetensors.index.json").exists() == shards
    same(load_released(folder)[0], network)


def test_text_norms_are_rounded_as_the_public_code_does(folder, network):
    name = "language_model.norm.weight"
    weights = dict(_weights(network)) | {name: torch.full_like(network.state_dict()[name], 1.0009765625)}
    save_file(weights, folder / "model.safetensors")
    assert (load_released(folder)[0].language_model.norm.weight == 1.0).all()


def test_a_pre_trained_checkpoint_has_no_action_head(folder, network):
    kept = {n: t for n, t in _weights(network) if not n.startswith("dit_action_head.")}
    save_file(kept, folder / "model.safetensors")
    model, _ = load_released(folder)
    assert model.config.expert is None and not hasattr(model, "dit_action_head")
    fresh = released_network(read_released(folder))
    assert fresh.config.expert == network.config.expert
    assert torch.equal(fresh.visual.pos_embed.weight, network.visual.pos_embed.weight)
    with pytest.raises(CheckpointError, match="cannot act"):
        model.sample(None, torch.zeros(1, 4, 5), torch.ones(1, 4, 5))


def test_a_vocabulary_that_grew_is_read_from_the_weights(folder, network):
    change(folder, vocab_size=VOCABULARY, text_config__vocab_size=VOCABULARY - 4)
    assert read_released(folder).vocab_size == VOCABULARY
    change(folder, vocab_size=VOCABULARY - 1)
    with pytest.raises(CheckpointError, match="disagree on the vocabulary"):
        read_released(folder)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("text_config__hidden_size", None, "text_config.hidden_size"),
        ("text_config__num_hidden_layers", -2, "a whole number above 0"),
        ("text_config__head_dim", "8", "text_config.head_dim"),
        ("text_config__rope_scaling__rope_type", "yarn", "only one supported"),
        ("text_config__rope_scaling__mrope_section", [2, 1], "add up to 4"),
        ("vision_config__deepstack_visual_indexes", [0.5], "list of whole numbers"),
        ("tie_word_embeddings", False, "tie_word_embeddings"),
        ("image_token_id", True, "token id"),
        ("dit_action_head_config__noise_beta_alpha", 2.0, "noise_beta_alpha"),
        ("dit_action_head_config", [], "dit_action_head_config"),
        ("model_type", "llama", "prts_qwen3_vl"),
    ],
)
def test_a_configuration_that_does_not_fit_names_the_field(folder, field, value, told):
    change(folder, **{field: value})
    with pytest.raises(CheckpointError, match=told) as fault:
        load_released(folder)
    assert "config.json" in str(fault.value)


def test_damaged_weights_name_the_tensors(folder, network):
    weights = dict(_weights(network))
    del weights["visual.pos_embed.weight"]
    weights["visual.stray"] = torch.zeros(3)
    weights["crl_logit_scale"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as fault:
        load_released(folder)
    for told in ("missing 1: visual.pos_embed.weight", "extra 1: visual.stray", "crl_logit_scale: (2,) instead of ()"):
        assert told in str(fault.value)
    many = {n: t for n, t in _weights(network) if not n.startswith("language_model.layers.1.")}
    save_file(many, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing 11: language_model\.layers\.1\.input_layernorm"):
        load_released(folder)


@pytest.mark.parametrize(
    ("change_names", "told"),
    [
        (lambda n: f"module.{n}", "inside a wrapper"),
        (lambda n: None if n.startswith("dit_action_head.") else n, "only the action head"),
        (lambda n: None if n.startswith("crl_") else n, "only the contrastive heads"),
        (lambda n: None if n.startswith("visual.") else n, "part of the weights is lost"),
    ],
)
def test_the_likely_cause_is_told(network, change_names, told):
    changed = {change_names(name): tensor for name, tensor in _weights(network)}
    changed.pop(None, None)
    with pytest.raises(CheckpointError, match=told):
        load_weights(network, changed, "here")
    rows = dict(_weights(network)) | {"language_model.embed_tokens.weight": torch.zeros(VOCABULARY + 1, 24)}
    with pytest.raises(CheckpointError, match="the vocabulary differs"):
        load_weights(network, rows, "here")


def test_a_head_of_its_own_is_refused(folder, network):
    save_file(dict(_weights(network)) | {"lm_head.weight": torch.zeros(VOCABULARY, 24)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="only tied ones"):
        load_released(folder)
    twice = dict(_weights(network)) | {"model.visual.pos_embed.weight": torch.zeros(1)}
    save_file(twice, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="stand twice"):
        load_released(folder)


def test_an_index_may_not_leave_its_folder(folder, network):
    (folder / "model.safetensors").unlink()
    save_sharded(folder, dict(_weights(network)), max_bytes=4000)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["visual.pos_embed.weight"] = "../secret.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="beside it"):
        load_released(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        fetch(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_released(tmp_path)


@pytest.mark.parametrize("kind", ["mot", "dit"])
def test_our_own_layout_round_trips_in_shards(tmp_path, shapes, kind):
    expert = shapes.expert if kind == "mot" else DitConfig(num_layers=3, num_heads=2, head_dim=6, output_dim=7)
    torch.manual_seed(1)
    model = PrtsModel(replace(shapes, expert=expert), VOCABULARY, IMAGE)
    save_sharded(tmp_path, model.state_dict(), max_bytes=3000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    raw = json.loads(json.dumps(asdict(model.config)))
    again = PrtsModel(check(ModelConfig, raw, "config.json"), VOCABULARY, IMAGE)
    load_weights(again, dict(load_sharded(tmp_path)), tmp_path)
    same(again, model)


def test_an_official_folder_gives_the_backbone(tmp_path, shapes, network):
    """Saved by transformers itself; our model on it equals transformers' own, and added tokens start near the mean."""
    torch.manual_seed(2)
    stock = Qwen3VLForConditionalGeneration._from_config(
        qwen3vl_config(shapes, VOCABULARY - 4, IMAGE), attn_implementation="eager"
    ).eval()
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stock.save_pretrained(tmp_path)
    config = resolve_pretrained(ModelConfig(pretrained=str(tmp_path)))
    assert (config.vision, config.text) == (shapes.vision, shapes.text)
    before = network.dit_action_head.action_in_proj.weight.clone()
    load_backbone(network, tmp_path)
    assert torch.equal(network.dit_action_head.action_in_proj.weight, before)
    rows = network.language_model.embed_tokens.weight
    spread, mean = torch.std_mean(rows[: VOCABULARY - 4], dim=0)
    away = (rows[VOCABULARY - 4 :] - mean) / spread
    assert 0.05 < away.std() < 0.2 and away.abs().max() < 0.6 and len(away.unique(dim=0)) == 4

    ids = torch.tensor([[1, 2, IMAGE, 3, 4, 5], [6, IMAGE, 7, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    pixels, grid = torch.randn(8, 96), torch.tensor([[1, 2, 2]] * 2)
    with torch.no_grad():
        ours = network.logits(
            network.encode(stock_tokens(network, ids, mask, pixel_values=pixels, image_grid_thw=grid)).hidden
        )
        theirs = stock(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels,
            image_grid_thw=grid,
            mm_token_type_ids=(ids == IMAGE).int(),
        ).logits
    inside = mask.bool()
    torch.testing.assert_close(ours[inside][:, : VOCABULARY - 4], theirs[inside], atol=2e-5, rtol=1e-4)


def test_a_network_without_memory_is_filled_and_is_the_same(tmp_path, shapes):
    """Frequencies of rotary positions are in no checkpoint: they must be there all the same."""
    torch.manual_seed(3)
    model = PrtsModel(shapes, VOCABULARY, IMAGE).eval()
    save_sharded(tmp_path, model.state_dict())
    empty = PrtsModel(shapes, VOCABULARY, IMAGE, empty=True).eval()
    assert (
        empty.language_model.embed_tokens.weight.is_meta and not empty.dit_action_head.position_embedding.weight.is_meta
    )
    load_weights(empty, load_sharded(tmp_path), tmp_path)
    same(empty, model)
    buffers = dict(empty.named_buffers())
    assert buffers and all(torch.equal(buffers[n], b) and not b.is_meta for n, b in model.named_buffers())
    ids, mask = torch.tensor([[1, 2, IMAGE, 3]]), torch.ones(1, 4, dtype=torch.long)
    seen = {"pixel_values": torch.randn(4, 96), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    with torch.no_grad():
        left, right = (m.encode(stock_tokens(m, ids, mask, **seen)).hidden for m in (model, empty))
    assert torch.equal(left, right) and all(p.requires_grad for p in empty.parameters())


def _weights(model: PrtsModel) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor.detach().clone()) for name, tensor in model.state_dict().items()]
