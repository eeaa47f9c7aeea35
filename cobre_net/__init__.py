"""Backends of cobre-shm that reach beyond one machine."""
