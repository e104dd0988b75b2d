"""What a death costs: recovery times, streams under the death of an engine, a soak."""
