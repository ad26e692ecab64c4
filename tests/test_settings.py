"""Settings: the defaults of the contract, every mistake named at once, secrets from files and never shown."""

from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from retry_scheduler.errors import BadSettings
from retry_scheduler.settings import Settings, load_settings
from tests.contract import SETTINGS


def shown(settings: Settings) -> dict[str, object]:
    values = {name.upper(): getattr(settings, name) for name in Settings.model_fields}
    return {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in values.items()
    }


def problems_of(**environment: str) -> list[str]:
    with pytest.raises(BadSettings) as refusal:
        load_settings(environment)
    return list(refusal.value.problems)


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = shown(load_settings({}))

    assert {name: settings[name] for name in SETTINGS} == SETTINGS


def test_an_empty_value_counts_as_unset_and_other_variables_are_not_looked_at() -> None:
    environment = dict.fromkeys(SETTINGS, "") | {"PATH": "/bin", "HTTP_PORTS": "x", "http_port": "1"}

    assert shown(load_settings(environment)) == shown(load_settings({}))


def test_values_are_taken_from_the_environment_it_is_given() -> None:
    settings = load_settings(
        {"HTTP_PORT": "9000", "POSTGRES_SSL": "true", "LOG_LEVEL": "debug", "RETRY_POLL_INTERVAL_MS": "5000"}
    )

    assert (settings.http_port, settings.postgres_ssl, settings.log_level) == (9000, True, "DEBUG")
    assert settings.poll_interval == timedelta(seconds=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PORT", "0"),
        ("HTTP_PORT", "65536"),
        ("HTTP_PORT", "80.5"),
        ("METRICS_PORT", "nine"),
        ("RABBITMQ_PREFETCH", "0"),  # 0 would mean without limit
        ("RABBITMQ_PREFETCH", "65536"),
        ("POSTGRES_POOL_MAX", "0"),
        ("POSTGRES_SSL", "perhaps"),
        ("DEFAULT_MAX_RETRIES", "-1"),
        ("DEFAULT_MAX_RETRIES", "1001"),
        ("BASE_DELAY_MS", "-1"),
        ("MAX_DELAY_MS", "1e400"),
        ("JITTER_MS", "NaN"),
        ("RETRY_POLL_INTERVAL_MS", "0"),
        ("MAX_PUBLISH_FAILURES", "0"),
        ("RETENTION_DAYS", "-1"),
        ("RETENTION_DAYS", "0.5"),
        ("START_PAUSED", "perhaps"),
        ("LOG_LEVEL", "TRACE"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5"),
        ("RETRY_QUEUE", "é" * 128),
        ("RETRY_QUEUE", "amq.retry"),
        ("RETRY_QUEUE", "two\nlines"),
        ("MANUAL_REVIEW_QUEUE", "q" * 256),
        ("MANUAL_REVIEW_QUEUE", "retry.scheduled"),
        ("METRICS_PORT", "8086"),
        ("HTTP_HOST", "a..b"),
        ("HTTP_HOST", "/run/socket"),
        ("POSTGRES_HOST", "a..b"),
        ("POSTGRES_HOST", "."),
        ("POSTGRES_HOST", f"{'a' * 64}.example"),
        ("POSTGRES_HOST", "db:5432"),
        ("POSTGRES_HOST", "postgresql://db/"),
        ("POSTGRES_HOST", "first,second"),
        ("POSTGRES_HOST", "a b"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(name: str, value: str) -> None:
    (problem,) = problems_of(**{name: value})

    assert name in problem
    assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    "host",
    ["db", "db.", "my_db.example.org", "bücher.example", "10.0.0.7", "::1", "fe80::1%eth0", "/run/a..b"],
)
def test_hosts_of_every_form_are_taken(host: str) -> None:
    assert load_settings({"POSTGRES_HOST": host}).postgres_host == host


@pytest.mark.parametrize(
    "url",
    [
        "localhost:5672",
        "http://localhost/",
        "amqp:///vhost",
        "amqp://user:hidden@host:port/",
        "amqp://user:hidden@host:70000/",
        "amqp://user:hidden@host:0/",
        "amqp://user:hidden@host/a/b",
        "amqp://user:hidden@a..b/",
        f"amqp://user:hidden@{'a' * 64}/",
        "amqp://user:hidden@[::1/",
        "amqp://user:hidden@host/?heartbeat=5",
        "amqp://user:hidden@host/?",
        "amqp://user:hidden@host/#part",
        "amqp://hidden@host/",  # whose password would it be?
        "amqp://:hidden@host/",
        "amqp://@host/",
        "amqp://user:hidden%E9@host/",
        "amqp://user:hidden%00@host/",
        "amqp://user:hidden@host/%E9",
        f"amqp://user:hidden@host/{'v' * 256}",
    ],
)
def test_a_wrong_broker_address_is_refused_without_being_shown(url: str) -> None:
    (problem,) = problems_of(RABBITMQ_URL=url)

    assert problem.startswith("RABBITMQ_URL: ")
    assert "hidden" not in problem


@pytest.mark.parametrize(
    "url",
    ["amqp://host", "amqps://u:p%40ss@host:5671/", "amqp://u:@h/", "amqp://[::1]:5672/%2F", "amqp://h/a%2Fb"],
)
def test_broker_addresses_of_every_form_are_taken(url: str) -> None:
    assert load_settings({"RABBITMQ_URL": url}).rabbitmq_url.get_secret_value() == url


@pytest.mark.parametrize(
    "url", ["hidden:4318", "grpc://hidden:4317", "http:///hidden", "http://hidden:port", "http://hidden:0"]
)
def test_a_wrong_collector_address_is_refused_without_being_shown(url: str) -> None:
    (problem,) = problems_of(OTEL_EXPORTER_OTLP_ENDPOINT=url)

    assert problem.startswith("OTEL_EXPORTER_OTLP_ENDPOINT: ")
    assert "hidden" not in problem


def test_all_mistakes_are_named_at_once() -> None:
    problems = problems_of(
        HTTP_PORT="x",
        BASE_DELAY_MS="y",
        POSTGRES_PASSWORD="p",
        POSTGRES_PASSWORD_FILE="/p",
        RABBITMQ_URL_FILE="/none",
    )

    assert sorted(problem.split(":")[0] for problem in problems) == [
        "BASE_DELAY_MS",
        "HTTP_PORT",
        "POSTGRES_PASSWORD_FILE",
        "RABBITMQ_URL_FILE",
    ]


def test_settings_that_disagree_are_named_also_when_several_do() -> None:
    problems = problems_of(
        POSTGRES_POOL_MIN="20",
        POSTGRES_POOL_MAX="10",
        HTTP_PORT="8000",
        METRICS_PORT="8000",
        RETRY_QUEUE="a",
        MANUAL_REVIEW_QUEUE="a",
    )

    assert sorted(problem.split(":")[0] for problem in problems) == [
        "HTTP_PORT",
        "POSTGRES_POOL_MIN",
        "RETRY_QUEUE",
    ]


def test_settings_that_disagree_are_named_together_with_those_that_are_wrong_by_themselves(
    tmp_path: Path,
) -> None:
    problems = problems_of(
        HTTP_PORT="abc",
        RETRY_QUEUE="a",
        MANUAL_REVIEW_QUEUE="a",
        POSTGRES_POOL_MIN="60",
        RABBITMQ_URL="amqps://host:x/",
        SSL_CERT_FILE=str(tmp_path / "none"),
    )

    assert sorted(problem.split(":")[0] for problem in problems) == [
        "HTTP_PORT",
        "POSTGRES_POOL_MIN",
        "RABBITMQ_URL",
        "RETRY_QUEUE",
        "SSL_CERT_FILE",
    ]


@pytest.mark.parametrize(
    "environment",
    [
        {"HTTP_PORT": "abc", "METRICS_PORT": "8086"},
        {"POSTGRES_POOL_MIN": "60", "POSTGRES_POOL_MAX": "many"},
        {"POSTGRES_POOL_MIN": "few", "POSTGRES_POOL_MAX": "5"},
        {"RETRY_QUEUE": "manual-review.pending", "MANUAL_REVIEW_QUEUE": "amq.review"},
        {"RETRY_QUEUE": "\udcff", "MANUAL_REVIEW_QUEUE": "retry.scheduled"},
    ],
)
def test_a_setting_that_is_wrong_by_itself_is_not_compared_with_others(environment: dict[str, str]) -> None:
    assert len(problems_of(**environment)) == 1


def test_a_pool_whose_chosen_minimum_is_above_the_maximum_is_refused_even_if_that_is_the_default() -> None:
    (problem,) = problems_of(POSTGRES_POOL_MIN="60")

    assert problem.startswith("POSTGRES_POOL_MIN: 60 is above POSTGRES_POOL_MAX, 50")


def test_a_pool_that_is_made_small_needs_no_second_setting() -> None:
    assert load_settings({"POSTGRES_POOL_MAX": "5"}).postgres_pool_max == 5


def test_secrets_come_from_files_without_the_newline_of_the_editor(tmp_path: Path) -> None:
    (tmp_path / "password").write_text(" with spaces \r\n")
    (tmp_path / "url").write_text("amqps://u:p@host/\n")

    settings = load_settings(
        {"POSTGRES_PASSWORD_FILE": str(tmp_path / "password"), "RABBITMQ_URL_FILE": str(tmp_path / "url")}
    )

    assert settings.postgres_password == SecretStr(" with spaces ")
    assert settings.rabbitmq_url.get_secret_value() == "amqps://u:p@host/"


@pytest.mark.parametrize("name", ["POSTGRES_PASSWORD", "RABBITMQ_URL"])
def test_a_secret_and_its_file_exclude_each_other(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("amqp://u:hidden@host/")

    (problem,) = problems_of(**{name: "amqp://u:hidden@host/", f"{name}_FILE": str(tmp_path / "secret")})

    assert problem.startswith(f"{name}_FILE: ")
    assert "hidden" not in problem


def test_an_empty_secret_file_leaves_it_to_the_variable_and_never_to_a_default(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    files = {
        "POSTGRES_PASSWORD_FILE": str(tmp_path / "empty"),
        "RABBITMQ_URL_FILE": str(tmp_path / "empty"),
    }

    settings = load_settings({"POSTGRES_PASSWORD": "p", "RABBITMQ_URL": "amqp://host/", **files})

    assert settings.postgres_password == SecretStr("p")
    assert settings.rabbitmq_url.get_secret_value() == "amqp://host/"
    (problem,) = problems_of(**files)
    assert problem.startswith("RABBITMQ_URL: ")


def test_a_secret_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")

    for path in (tmp_path / "none", tmp_path, tmp_path / "binary"):
        (problem,) = problems_of(POSTGRES_PASSWORD_FILE=str(path))
        assert problem.startswith(f"POSTGRES_PASSWORD_FILE: cannot read {path}")


def test_no_secret_is_shown_when_settings_are_printed() -> None:
    settings = load_settings({"POSTGRES_PASSWORD": "hidden", "RABBITMQ_URL": "amqp://u:hidden@host/"})

    assert "hidden" not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"
