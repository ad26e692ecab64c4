"""Shows the service at work on one machine, with a PostgreSQL and a RabbitMQ of its own."""
