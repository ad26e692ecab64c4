"""The broker façade: RabbitMQ through pika, behind awaitable calls that survive whatever arrives.

    intake_link    consumes the retry queue in batches, on a connection of its own
    publish_link   publishes batches and learns what became of each message
      spare_links    links for what must travel alone
      publication    one message on its way out
      confirms       the ledger of publications whose outcome is not known yet
      waves          when the answers that have come are taken
      circuits       which queues do not confirm, and what may be sent to them: `breaker` with a clock
      size_limit     how large a message the broker takes
    permission     whether we may publish
    topology       declares our queues, or uses them as they are
    connection     opens one AMQP connection and channel; reconnects for ever
    wire           pika's connection with many frames in one system call
      frames         the bytes of a message, written and read in one step
    stalls         notices that the process has stood still
    properties     message properties and headers as raw bytes: nothing decoded, nothing changed

pika is imported in this package only. Two connections, because a broker alarm blocks those that
publish: intake goes on; a third only while something travels alone. Callbacks never raise, since pika
closes the connection of one that does.
"""
