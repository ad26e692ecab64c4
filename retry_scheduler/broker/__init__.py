"""The broker façade: RabbitMQ through pika, behind awaitable calls that survive whatever arrives.

    intake_link    consumes the retry queue in batches, on a connection of its own
    publish_link   publishes batches and learns what became of each message
    wire           pika's connection with many frames in one system call
    connection     opens one AMQP connection and channel; reconnects for ever
    confirms       the ledger of publications whose outcome is not known yet
    properties     message properties and headers as raw bytes: nothing decoded, nothing changed
    topology       declares our queues, or uses them as they are

pika is imported in this package only. Two connections, because a broker alarm blocks those that
publish: intake goes on. Callbacks never raise, since pika closes the connection of one that does.
"""
