"""What a probe is answered: pure decisions from a phase and a path, translated by the adaptors."""

from zdd_web.health.decision import Probe, Reply, decide, table

__all__ = ["Probe", "Reply", "decide", "table"]
