"""Bookkeeping of runs: nothing outside of this folder and scripts/ imports it."""
