"""The mixture-of-transformers action head: one block per language-model layer, over that layer's keys and values."""
