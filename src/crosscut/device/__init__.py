"""What surrounds the kernels on a GPU: their tiles, their launches, and where their results lie.

:mod:`.tiles` has the sizes of tiles, :mod:`.tuned` those that were measured on this machine,
:mod:`.launch` what launches kernels and compiles them ahead, :mod:`.workspace` memory.
"""
