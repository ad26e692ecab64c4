"""What the service tells about itself.

events          the sentences of the log
logs            one JSON object a line; `line_writer` writes them without waiting
metrics         Prometheus; `metrics_server` answers for them on threads of its own
live            figures that are read at the moment they are asked for
tracing         spans, if a collector is configured
"""
