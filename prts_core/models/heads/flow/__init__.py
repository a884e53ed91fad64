"""What both action heads share, flow matching: time.py the times, loss.py the objective, sampler.py the integration."""
