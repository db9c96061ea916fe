"""Every ``torch.library`` op of the namespace ``spec_compile::``: schema, fake and reference. Knows nothing of FX or transformers."""
