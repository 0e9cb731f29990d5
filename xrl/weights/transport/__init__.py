"""How weight buckets reach the rollout workers: one file a transport."""
