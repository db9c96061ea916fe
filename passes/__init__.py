"""FX passes, one a file, each usable alone: a ``StageGraph`` goes in, a ``StageGraph`` comes out.

``graph`` (the form), ``stage``, ``narrow_logits``, ``fuse_linears``, ``partition``, ``select_backend`` (with its table in
``preference``), ``lower``; ``pipeline`` lists them in order. ``SPEC_COMPILE_LOGS=passes`` prints what each did, ``+passes``
its graph too.
"""
