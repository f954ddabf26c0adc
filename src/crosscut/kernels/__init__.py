"""Device code, a file per kernel, and nothing else: no options, no autograd, no policy.

Importing any module of this package needs Triton (but for :mod:`.tuned`); importing crosscut does
not. Each file reads from top to bottom: what is computed and which program owns which tile,
helpers, kernel, launcher.
"""
