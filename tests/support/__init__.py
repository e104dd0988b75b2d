"""What tests share: worlds, workers, servers, models."""
