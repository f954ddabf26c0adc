"""Random problems for every public function, judged against float64.

Read in this order: :mod:`.problem` (what a problem is, and the text of its call), :mod:`.generator`
(how problems are drawn), :mod:`.rounding` and :mod:`.dense` (the truth, and how far rounding takes
PyTorch from it), :mod:`.judge`, :mod:`.shrinker`, :mod:`.__main__` (the command). :mod:`.plain` is
PyTorch itself as a contender: the limits are right if it never breaks them.
"""
