"""Make a product of goal reachability: curves, ranking of demonstrations, plots."""
