"""retry-scheduler: keeps failed RabbitMQ messages in PostgreSQL and sends each back when it is due."""

__version__ = "1.0.0"
