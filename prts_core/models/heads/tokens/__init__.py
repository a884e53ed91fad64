"""An action head of tokens: module.py the network, loss.py the objective, density.py what is drawn from its logits."""
