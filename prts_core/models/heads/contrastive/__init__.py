"""The two contrastive heads phi(s, a) and psi(l): module.py the networks, loss.py the symmetric objective."""
