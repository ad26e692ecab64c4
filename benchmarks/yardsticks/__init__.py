"""What the service is measured against, from "no service at all" to "what one would build instead".

    native          RabbitMQ alone: TTL and dead-letter exchange
    bare            the same broker and database work as the service's in the plainest script
    pgqueuer_peer   PgQueuer with a RabbitMQ consumer in front and a confirmed publish behind
    celery_peer     Celery with an ETA on RabbitMQ; celery_message writes its tasks

All but `native` are programs of their own (`python -m benchmarks.yardsticks.bare`), which read
RABBITMQ_URL, POSTGRES_HOST, _PORT, _USER and _DB, print "ready", and work until SIGTERM.
"""
