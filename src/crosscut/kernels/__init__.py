"""Device code and what launches it, a file per kernel, and nothing else: no options, no autograd.

Importing any module of this package needs Triton; importing crosscut does not. Each file reads from
top to bottom: what is computed and which program owns which tile, helpers, kernel, launcher.
"""
