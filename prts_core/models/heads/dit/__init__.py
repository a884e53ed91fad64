"""The DiT action head: blocks that attend in turn to the language model's last hidden states and to themselves."""
