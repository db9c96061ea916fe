"""FX passes, one a file, each usable alone: a ``StageGraph`` goes in, a ``StageGraph`` comes out.

``graph`` (the form), ``stage``, ``narrow_logits``, ``fuse_linears``, ``select_backend``, ``lower``, ``partition``;
``pipeline`` lists them in order. ``SPEC_COMPILE_LOGS=passes`` prints what each did.
"""
