"""The bench behind ``crosscut bench``: real heads, every way to compute their loss, one table.

Read in this order: :mod:`.workloads` (what is computed), :mod:`.contenders` (by whom),
:mod:`.truth` (what the right answer is), :mod:`.measure` (gate, clock and memory meter),
:mod:`.results` (what is written down) and :mod:`.report` (how it is shown). :mod:`.real_head` and
:mod:`.progress` serve them; :mod:`.tune` measures tile sizes with the same clock.
:mod:`.estimate` says what a head costs without computing it, :mod:`.estimate_report` shows that.
The library itself never imports any of this.
"""


class BenchError(Exception):
    """Something the person at the keyboard can put right. The message says what and how."""
