"""Count the floating-point operations of a step, for MFU (model FLOPs utilisation, PaLM, arXiv:2204.02311, appendix B):

    MFU = FLOPs of a step / (seconds of a step * peak FLOPs a second of all devices)

Counted are matrix products, 2 FLOP a multiply-add, of everything the step's result needs: vision tower, language model,
logits of labels, action head, contrastive encoders; attention on the pairs that may see each other. Not counted:
padding, norms, activations, and what is computed twice (activation checkpointing, a flash kernel's backward pass).
Backward is twice the forward, once for inputs and once for weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from prts_core.config.model import (
    ActionHeadConfig,
    ContrastiveConfig,
    DitConfig,
    ModelConfig,
    TextConfig,
    TokensConfig,
    VisionConfig,
)
from prts_core.models.heads.contrastive.module import LAYERS
from prts_core.models.heads.dit.module import TIME_CHANNELS
from prts_core.models.tokens import Tokens

Part = Literal["vision", "language", "logits", "action", "contrastive"]

# Dense bf16 peaks in FLOP/s, from NVIDIA's data sheets (sparsity off), by what torch.cuda.get_device_name says.
PEAKS = {
    "H200": 989.4e12,
    "H100 PCIe": 756.0e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165.2e12,
}


@dataclass(frozen=True)
class Counts:
    """What a forward pass goes over, of one batch or of many added up; padding is not among it.

    tokens, pairs: of the language model, and its (query, key) pairs that may see each other. patches, patch_pairs: of
    the vision tower, before merging, and the sum of squares of patches a frame. labels: tokens that the logits are
    taken for. draws: noise draws of the action head, or denoising steps when it samples. context: tokens of the
    prompts that it reads; prompt: the same, added up over the draws. contrasted: samples with phi and psi.
    """

    tokens: int = 0
    pairs: int = 0
    patches: int = 0
    patch_pairs: int = 0
    labels: int = 0
    draws: int = 0
    context: int = 0
    prompt: int = 0
    contrasted: int = 0

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})


def counts_of(tokens: Tokens, draws: int) -> Counts:
    """The counts of a batch that lies on the CPU (elsewhere it waits for the device). draws: a sample."""
    grid = tokens.grid if tokens.video_grid is None else torch.cat([tokens.grid, tokens.video_grid])
    frames = grid[:, 1] * grid[:, 2]
    return Counts(
        tokens=tokens.count,
        pairs=tokens.mask.visible_pairs,
        patches=int((grid[:, 0] * frames).sum()),
        patch_pairs=int((grid[:, 0] * frames.square()).sum()),
        labels=int((tokens.labels[:, 1:] != -100).sum()),
        draws=draws * len(tokens),
        context=(context := int((tokens.prompt_end - tokens.start).sum())),
        prompt=draws * context,
        contrasted=int((tokens.state_action_index >= 0).sum()),
    )


def forward_flops(model: ModelConfig, counts: Counts, vocabulary: int) -> dict[Part, float]:
    """FLOPs of one forward pass by part; a model without a head has 0 there."""
    found: dict[Part, float] = {
        "vision": _vision(model.vision, model.text.hidden_size, counts),
        "language": _language(model.text, counts),
        "logits": 2.0 * counts.labels * model.text.hidden_size * vocabulary,
        "action": 0.0 if model.expert is None else _action(model.expert, model, counts),
        "contrastive": 0.0 if model.contrastive is None else _contrastive(model.contrastive, model.text, counts),
    }
    return found


def training_flops(
    forward: dict[Part, float], frozen: Collection[Part] = (), cut: Collection[Part] = ()
) -> dict[Part, float]:
    """FLOPs of forward and backward by part. frozen: parts without gradients of their weights, which gradients still
    pass through (the language model under LoRA: 2 instead of 3 times the forward). cut: parts that no gradient enters
    (a frozen vision tower: once)."""
    return {part: flops * (1 if part in cut else 2 if part in frozen else 3) for part, flops in forward.items()}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; none where it is not known."""
    return next((peak for name, peak in PEAKS.items() if all(word in device_name for word in name.split())), None)


# ---- the parts ---------------------------------------------------------------------------------------------------
def _vision(v: VisionConfig, out: int, counts: Counts) -> float:
    """A still's two equal time slices meet the patch convolution as one. DeepStack levels have a merger each."""
    wide = v.hidden_size * v.merge_size**2
    embed = 3 * v.patch_size**2 * v.hidden_size
    block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    merger = (1 + len(v.deepstack_indexes)) * (wide * wide + wide * out) / v.merge_size**2
    return (
        2.0 * counts.patches * (embed + v.depth * block + merger) + 4.0 * counts.patch_pairs * v.depth * v.hidden_size
    )


def _language(t: TextConfig, counts: Counts) -> float:
    queries, keys = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    layer = 2 * t.hidden_size * (queries + keys) + 3 * t.hidden_size * t.intermediate_size
    return t.num_layers * (2.0 * counts.tokens * layer + 4.0 * counts.pairs * queries)


def _action(head: ActionHeadConfig, model: ModelConfig, counts: Counts) -> float:
    """Velocity of `draws` chunks; keys and values that a DiT makes of a prompt serve all draws of its sample. Of a
    tokens head, which takes no noise, a draw is a sample."""
    steps, actions, memory = model.chunk_length, model.max_action_dim, model.text.hidden_size
    if isinstance(head, TokensConfig):
        queries = steps * actions
        pairs = queries * (counts.prompt + counts.draws * queries)
        said = 2.0 * counts.draws * queries * memory * head.bins
        return said + _language(model.text, Counts(tokens=counts.draws * queries, pairs=pairs))
    if isinstance(head, DitConfig):
        width, crossing = head.num_heads * head.head_dim, (head.num_layers + 1) // 2
        own = head.num_layers - crossing
        a_draw = TIME_CHANNELS * width + width**2 + (head.num_layers + 1) * 2 * width**2  # time code, adaptive norms
        a_step = head.num_layers * (2 + 2 * head.mlp_ratio) * width**2 + own * 2 * width**2
        a_step += 2 * actions * width + 3 * width**2 + 2 * width * head.output_dim + width * actions
        pairs = crossing * steps * counts.prompt + own * counts.draws * steps**2
        dense = counts.draws * (a_draw + steps * a_step) + counts.context * crossing * 2 * memory * width
        return 2.0 * dense + 4.0 * pairs * width
    text, width = model.text, head.hidden_size
    queries, keys = head.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    a_draw = 2 * width**2 + (2 * text.num_layers + 1) * 3 * width**2
    a_step = text.num_layers * (2 * width * (queries + keys) + 3 * width * head.intermediate_size) + 3 * actions * width
    pairs = text.num_layers * steps * (counts.prompt + counts.draws * steps)
    return 2.0 * counts.draws * (a_draw + steps * a_step) + 4.0 * pairs * queries


def _contrastive(c: ContrastiveConfig, text: TextConfig, counts: Counts) -> float:
    """Both encoders; the scores of all pairs are left out (under a thousandth)."""
    one = text.hidden_size * c.hidden_size + (LAYERS - 1) * c.hidden_size**2 + c.hidden_size * c.embed_dim
    return 4.0 * counts.contrasted * one
