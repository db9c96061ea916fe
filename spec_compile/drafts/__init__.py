"""Draft kinds, one a file behind the interface of ``runtime/draft.py``; ``make`` picks one."""
