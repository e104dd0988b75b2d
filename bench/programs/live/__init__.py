"""Programs in real time, on real engines or modelled ones behind the real broker."""
