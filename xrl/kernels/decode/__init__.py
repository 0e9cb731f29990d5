"""What the embedded engine runs: layers over a paged cache of keys and values, without gradients, and the sampling."""
