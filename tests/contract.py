"""What docs/contract.md and the runbook promise by name: what tests compare the program with."""

# Events of each message's life, and troubles that operators search for, with their levels.
OPERATIONS = {
    "Retry scheduled": "INFO",
    "Retry executed successfully": "INFO",
    "Max retries exceeded - moved to manual review": "WARNING",
}
TROUBLES = {
    "Failed to save retry task": "ERROR",
    "Failed to get due retry tasks": "ERROR",
    "Failed to start RabbitMQ consumer": "WARNING",
    "Failed to connect to RabbitMQ": "WARNING",
    "PostgreSQL health check failed": "WARNING",
}

METRICS = {
    "retries_scheduled_total",
    "retries_executed_total",
    "retries_exhausted_total",
    "retry_queue_depth",
    "service_up",
    "retry_lateness_seconds_bucket",
    "retry_lateness_seconds_count",
    "retry_lateness_seconds_sum",
    "retry_oldest_due_seconds",
    "retry_duplicates_total",
    "retry_quarantined_total",
    "retry_publications_unknown_total",
    "retry_reconnects_total",
    "retry_log_lines_dropped_total",
}

SETTINGS = {
    "SERVICE_NAME": "retry-scheduler",
    "LOG_LEVEL": "INFO",
    "HTTP_HOST": "0.0.0.0",
    "HTTP_PORT": 8086,
    "METRICS_PORT": 9094,
    "RABBITMQ_URL": "amqp://guest:guest@localhost:5672/",
    "RABBITMQ_PREFETCH": 10,
    "RETRY_QUEUE": "retry.scheduled",
    "MANUAL_REVIEW_QUEUE": "manual-review.pending",
    "POSTGRES_HOST": "localhost",
    "POSTGRES_PORT": 5432,
    "POSTGRES_DB": "eracun",
    "POSTGRES_USER": "eracun",
    "POSTGRES_PASSWORD": None,
    "POSTGRES_POOL_MIN": 10,
    "POSTGRES_POOL_MAX": 50,
    "POSTGRES_SSL": False,
    "DEFAULT_MAX_RETRIES": 3,
    "BASE_DELAY_MS": 2000,
    "MAX_DELAY_MS": 60000,
    "JITTER_MS": 1000,
    "RETRY_POLL_INTERVAL_MS": 10000,
    "MAX_PUBLISH_FAILURES": 10,
}

# Printed by the documents: publications outstanding per instance, the most that its death can double.
MOST_DUPLICATES = 512
LATE_AT_MOST_S = 5.0
HEALED_WITHIN_S = 5.0
ANSWERS_WITHIN_S = 2.0
STOPS_WITHIN_S = 20.0
