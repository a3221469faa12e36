"""The training run: plan a step, take it, log it; now and then evaluate and save."""
