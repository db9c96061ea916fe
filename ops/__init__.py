"""Every ``torch.library`` op of the namespace ``spec_compile::``: schema, fake, reference. Knows no FX and no transformers."""
