"""Who computes what: rank arithmetic, process groups, and megatron-core's set-up on CUDA and on CPU."""
