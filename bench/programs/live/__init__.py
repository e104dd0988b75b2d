"""Runs programs in real time, on real or modelled engines behind the real broker."""
