"""The handover from one generation to the next, seen from both sides."""
