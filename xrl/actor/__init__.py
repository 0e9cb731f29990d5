"""The model being trained: log-probs and updates at any tensor x pipeline x data parallel layout."""
