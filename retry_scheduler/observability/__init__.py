"""What the service tells about itself: `logs` (one JSON object a line), `metrics` (Prometheus), and
`live`, which reads figures at the moment they are asked for."""
