"""What `peers.py`, `quality.py` and `greedy.py` share: environments, model files, workers, figures."""
