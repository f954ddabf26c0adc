"""Programs that tests start in a process of their own, or that people run."""
