"""The heads on the backbone: mot and dit make actions by flow matching (flow/), tokens says them in bins, contrastive
makes the value.

One small file set per head: its shape in prts_core/config/model.py, importable without torch; module.py the network;
loss.py, sampler.py and density.py (what is drawn while a policy explores) where they are its own. They know no text,
files or robots. A flow head is called `head(x (S, T, A), dof_mask (S, T, A), time (S,), prefix) -> velocity (S, T, A)`,
`prefix` as in models/tokens.py; a tokens head `head(prefix, dof_mask, language_model) -> logits (S, T, A, bins)`.
"""
