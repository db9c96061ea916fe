"""FX passes, one a file, each usable alone: a ``StageGraph`` goes in, a ``StageGraph`` comes out.

``graph`` is the form, ``pipeline`` lists the passes in order. ``select_backend`` has its table in ``preference``, what the user
may say in ``backend_option``, and what it knows of a node in ``node_description`` (in words: ``node_words``).
``SPEC_COMPILE_LOGS=passes`` prints what each pass did, ``+passes`` its graph too.
"""
