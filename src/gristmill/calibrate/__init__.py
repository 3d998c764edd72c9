"""Calibration: what a model's activations look like on a text, and equivalent rewrites of its weights.

`text` chooses the tokens, `stream` runs a model over them node by node, `statistics` sums up what is seen
there, `sites` says where scales may be moved between weights, and `planted` uses that to make test models
with outliers. `stream` and `statistics` need PyTorch (extra `torch`); nothing is imported before it is used.
"""
