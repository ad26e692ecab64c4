"""Speed and punctuality, measured on private servers. `make bench` runs `benchmarks.suite`."""
