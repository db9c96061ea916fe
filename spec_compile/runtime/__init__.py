"""What happens on every token: KV pool, stage programs, the round, graph capture, the decode loop, statistics."""
