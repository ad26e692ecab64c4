"""Every sentence that the log may say, and nothing else.

Operators search for them, and docs/runbook.md explains each: they are a contract. Values go into an
event's fields, never into its sentence.
"""

# Each retry's life.
RETRY_SCHEDULED = "Retry scheduled"
RETRY_EXECUTED = "Retry executed successfully"
RETRY_NOT_DELIVERED = "Retry not delivered - will be tried again"
RETRY_UNKNOWN = "Retry outcome unknown - will be sent again under the same x-retry-id"
RETRY_SUSPECT = "Retry may have closed the channel - will be sent again alone"
RETRY_OVERTAKEN = "Retry settled by another instance"
EXHAUSTED = "Max retries exceeded - moved to manual review"
UNDELIVERABLE = "Retry undeliverable - moved to manual review"
DUPLICATE_IGNORED = "Duplicate request ignored"
QUARANTINED = "Malformed request quarantined"
QUARANTINE_DELIVERED = "Malformed request moved to manual review"
QUEUE_HANGS = "Queue does not confirm - its retries are held back"
QUEUE_CONFIRMS = "Queue confirms again"

# A server is away, or refuses.
SAVE_FAILED = "Failed to save retry task"
QUARANTINE_CLAIM_FAILED = "Failed to get quarantined messages"
CLAIM_FAILED = "Failed to get due retry tasks"
SETTLE_FAILED = "Failed to settle retry tasks"
CONSUMER_FAILED = "Failed to start RabbitMQ consumer"
RABBITMQ_FAILED = "Failed to connect to RabbitMQ"
POSTGRES_FAILED = "PostgreSQL health check failed"
ARCHIVE_FAILED = "Failed to archive finished retries"
SPANS_LOST = "Spans not delivered to the collector"
MANAGER_DEAF = "Cannot tell the service manager"
LINES_DROPPED = "Log lines dropped"

# An instance's life.
STARTING = "Service starting"
MIGRATED = "Database migrated"
PAUSED = "Service paused - nothing is claimed"
RELEASED = "Service released - claiming begins"
NOT_PAUSED = "Release ignored: the service is not paused"
SECRETS_RELOADED = "Secrets reloaded - connections made from now on use them"
SECRETS_KEPT = "Secrets not reloaded - those from before stay in use"
ARCHIVED = "Finished retries archived"
INSTANCE_BURIED = "An instance has stopped beating - its claimed retries are taken over"
STOPPING = "Service stopping"
UNSETTLED = "Stopping without settling everything: a server does not answer; the rest will be taken over"
STOPPED = "Service stopped"

# Bugs of ours, and what is done about them.
UNREADABLE = "Cannot read a request"
UNBUILDABLE = "Cannot build a message"
BATCH_FAILED = "Failed to deliver a batch"
CONNECTION_FAILED = "The connection's task failed"
PAGE_FAILED = "Failed to answer a reader of /metrics"
LOOP_STANDS = "A loop stands still - the service manager should restart us"
PART_DIED = "A part of the service died - stopping"
PART_FAILED_LATE = "A part of the service failed while stopping"
SERVICE_FAILED = "Service failed"
