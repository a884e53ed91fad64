"""The two contrastive heads against the public implementation's numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.models.golden_case import ACTIVATIONS, load_case, meet


@torch.no_grad()
def test_golden_crl_heads():
    case = load_case("crl_heads")
    got = {}
    for side, encoder in (("action", case.model.crl_action_encoder), ("goal", case.model.crl_goal_encoder)):
        hooks = [
            norm.register_forward_hook(
                lambda module, args, out, name=f"{side}_layer_{i}_out": got.__setitem__(name, F.silu(out))
            )
            for i, norm in enumerate(encoder.layer_norms)
        ]
        hooks.append(
            encoder.output_proj.register_forward_hook(
                lambda module, args, out, name=f"{side}_embedding_raw": got.__setitem__(name, out)
            )
        )
        got[f"{side}_embedding_normalized"] = encoder(case.inputs[f"{side}_hidden"])
        for hook in hooks:
            hook.remove()
    got["crl_logit_scale"] = case.model.crl_logit_scale
    got["crl_logit_scale_exp"] = case.model.crl_logit_scale.exp()
    got["pairwise_dot_normalized"] = got["action_embedding_normalized"] @ got["goal_embedding_normalized"].T
    assert got.keys() == case.outputs.keys()
    meet(got, case, **ACTIVATIONS)
