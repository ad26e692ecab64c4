"""Says what there is to see and to try while the demo stays up. Texts only."""

import shlex

from retry_scheduler.demo.postgres_programs import find_programs
from retry_scheduler.demo.stage import Stage

PAYLOAD = "aGVsbG8="  # "hello" in base64


def guide_lines(stage: Stage) -> list[str]:
    """Return the guide, line by line; every command in it can be copied into a shell as it stands."""
    settings, postgres = stage.settings, stage.postgres
    pages = f"http://{settings.http_host}:{settings.http_port}"
    metrics = f"http://{settings.http_host}:{settings.metrics_port}/metrics"
    psql = shlex.join(
        [
            *(str(find_programs() / "psql"), "-h", postgres.host, "-p", str(postgres.port)),
            *("-U", settings.postgres_user, settings.postgres_db),
        ]
    )
    return [
        "Everything stays up until you press Ctrl-C. Look around, from another terminal:",
        "",
        f"curl -s {pages}/health",
        f"curl -s {pages}/ready",
        f"curl -s {metrics} | grep ^retr",
        f"{psql} -c 'TABLE retry_queue' -x | tail -60",
        f"less {stage.log}",
        "",
        f"RabbitMQ's management page: {stage.rabbitmq.management_url}  (user guest, password guest)",
        "",
        "Or ask for a retry yourself. It comes back to the queue `orders`, and you see it here, in 2 to 3 s:",
        "",
        *_request(stage),
        "",
    ]


def _request(stage: Stage) -> list[str]:
    body = (
        r"{\"message_id\": \"'$(cat /proc/sys/kernel/random/uuid)'\", \"original_queue\": \"orders\", "
        rf"\"original_payload\": \"{PAYLOAD}\", \"error_reason\": \"just trying\"}}"
    )
    return [
        "curl -s -u guest:guest -H 'content-type: application/json' "
        f"{stage.rabbitmq.management_url}/api/exchanges/%2F/amq.default/publish -d '",
        f'{{"routing_key": "{stage.settings.retry_queue}", "properties": {{"delivery_mode": 2}},',
        f' "payload_encoding": "string", "payload": "{body}"}}\'',
    ]
