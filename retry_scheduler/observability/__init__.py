"""What the service tells about itself: `logs` (one JSON object a line) and `metrics` (Prometheus)."""
