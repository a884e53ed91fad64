"""The heads on the backbone: mot and dit make actions by flow matching (flow/), contrastive makes the value.

One small file set per head: config.py its shape, importable without torch; module.py the network; loss.py and
sampler.py where they are its own. They know no text, files or robots. An action head is called
`head(x (S, T, A), dof_mask (S, T, A), time (S,), prefix) -> velocity (S, T, A)`, `prefix` as in models/tokens.py.
"""
