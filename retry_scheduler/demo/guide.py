"""Says what there is to see and to try while the demo stays up. Texts only."""

import shlex

from retry_scheduler.demo.postgres_programs import find_programs
from retry_scheduler.demo.stage import Stage

PAYLOAD = "aGVsbG8="  # "hello" in base64
LATEST_ROWS = (
    "SELECT message_id, original_queue, retry_count, status, next_retry_at"
    " FROM retry_queue ORDER BY id DESC LIMIT 5"
)


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
        "Everything stays up until you press Ctrl-C. From another terminal, look around:",
        "",
        f"curl -s {pages}/health; echo",
        f"curl -s {pages}/ready; echo",
        f"curl -s {metrics} | grep ^retries",
        f"tail {stage.log}",
        f"{psql} -c '{LATEST_ROWS}'",
        "",
        f"RabbitMQ's management page, user guest, password guest: {stage.rabbitmq.management_url}",
        "",
        "Or ask for a retry yourself. Here you see it stored, and 2 to 3 s later back on `orders`:",
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
        f' "payload_encoding": "string", "payload": "{body}"}}\'; echo',
    ]
