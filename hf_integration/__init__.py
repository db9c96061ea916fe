"""Everything that knows transformers: capturing a module as a graph, binding generate(), loading checkpoints."""
