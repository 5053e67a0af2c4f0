"""Notices that a run goes wrong: warnings with what to try, and when a run has clearly diverged."""
