"""Reads the settings from the environment, checks them all, and names every wrong one at once.

Read by `cli` alone and handed down; no other module looks at the environment.
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from retry_scheduler.addresses import problem_with_amqp_url, problem_with_host, problem_with_http_url
from retry_scheduler.errors import BadSettings
from retry_scheduler.tls import problem_with_authorities

# Settings that may name a file instead, so that no secret stands in a process's environment.
SECRETS = ("POSTGRES_PASSWORD", "RABBITMQ_URL")

# A collector's address may hold a key.
_NEVER_SHOWN = (*SECRETS, "OTEL_EXPORTER_OTLP_ENDPOINT")

Port = Annotated[int, Field(ge=1, le=65535)]
QueueName = Annotated[str, Field(min_length=1)]
Milliseconds = Annotated[int, Field(ge=0, le=86_400_000)]


class Settings(BaseSettings):
    """Every setting with its default. An environment variable has the field's name in capitals."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    service_name: str = Field("retry-scheduler", description="Name in logs and in the label of service_up")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO", description="Least severe level that is logged"
    )
    http_host: str = Field("0.0.0.0", description="Address that /health, /ready and /metrics listen on")  # noqa: S104  the contract's default; these pages tell no secret
    http_port: Port = Field(8086, description="Port of /health and /ready")
    metrics_port: Port = Field(9094, description="Port of /metrics")

    rabbitmq_url: SecretStr = Field(
        SecretStr("amqp://guest:guest@localhost:5672/"),
        description="Broker; amqps:// for TLS; guest:guest if it names no user; options (?...) are refused",
    )
    rabbitmq_prefetch: Annotated[int, Field(ge=1, le=65535)] = Field(
        10, description="Most requests in hand and not yet stored; all of them must fit the memory"
    )
    retry_queue: QueueName = Field("retry.scheduled", description="Queue that requests come in on")
    manual_review_queue: QueueName = Field(
        "manual-review.pending", description="Queue of messages for people"
    )

    postgres_host: str = Field(
        "localhost",
        min_length=1,
        description="Database server itself, no PgBouncer; or the folder of its Unix socket",
    )
    postgres_port: Port = Field(5432, description="Its port")
    postgres_db: str = Field("eracun", min_length=1, description="Database")
    postgres_user: str = Field("eracun", min_length=1, description="Role")
    postgres_password: SecretStr | None = Field(None, description="Password; unset or empty means none")
    postgres_pool_min: Annotated[int, Field(ge=0, le=1000)] = Field(10, description="Connections kept open")
    postgres_pool_max: Annotated[int, Field(ge=1, le=1000)] = Field(50, description="Most connections")
    postgres_ssl: bool = Field(
        False, description="Encrypt and verify the server; never falls back to plain text"
    )

    default_max_retries: Annotated[int, Field(ge=0, le=1000)] = Field(
        3, description="Retries of a message whose request names no max_retries"
    )
    base_delay_ms: Milliseconds = Field(2000, description="Delay of the first retry; doubles with each")
    max_delay_ms: Milliseconds = Field(60000, description="Longest delay, without jitter")
    jitter_ms: Milliseconds = Field(1000, description="Up to this much is added to each delay, at random")
    retry_poll_interval_ms: Annotated[int, Field(ge=1, le=3_600_000)] = Field(
        10000,
        description="How often the table is looked at, but at least once and at most ten times a second",
    )
    max_publish_failures: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        10, description="Returned or refused publications after which a message goes to manual review"
    )

    retention_days: Annotated[int, Field(ge=0, le=36_500)] = Field(
        30, description="Attempts finished longer ago are moved to retry_queue_archive, daily; 0: never"
    )
    start_paused: bool = Field(
        False, description="Take requests but send nothing until SIGUSR1: after a restore from a backup"
    )
    # What else the OpenTelemetry SDK can be told, it reads from the environment itself.
    otel_exporter_otlp_endpoint: str | None = Field(
        None,
        description="Collector for traces, such as http://jaeger:4318; unset: no tracing (docs/tracing.md)",
    )
    otel_traces_sampler: Literal[
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    ] = Field(
        "parentbased_always_on",
        description="Which spans are made; ours have no parent, so parentbased_ changes nothing",
    )
    otel_traces_sampler_arg: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Share of the spans that traceidratio makes, 0 to 1"
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _accept_lower_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("otel_traces_sampler", mode="before")
    @classmethod
    def _accept_capitals(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("http_host", "postgres_host")
    @classmethod
    def _be_a_host(cls, value: str, info: ValidationInfo) -> str:
        if info.field_name == "postgres_host" and value.startswith("/"):
            return value  # the folder of a Unix socket
        if problem := problem_with_host(value):
            raise ValueError(problem)
        return value

    @field_validator("otel_exporter_otlp_endpoint")
    @classmethod
    def _be_an_http_url(cls, value: str | None) -> str | None:
        problem = problem_with_http_url(value) if value is not None else None
        if problem:
            raise ValueError(problem)
        return value

    @field_validator("retry_queue", "manual_review_queue")
    @classmethod
    def _fit_a_short_string(cls, value: str) -> str:
        if len(value.encode()) > 255:
            raise ValueError("must be at most 255 bytes long, AMQP's limit for a queue name")
        if any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise ValueError("must not hold control characters; the broker would change the name")
        if value.startswith("amq."):
            raise ValueError("must not begin with amq., which the broker reserves for itself")
        return value

    @field_validator("rabbitmq_url")
    @classmethod
    def _be_an_amqp_url(cls, value: SecretStr) -> SecretStr:
        if problem := problem_with_amqp_url(value.get_secret_value()):
            raise ValueError(problem)
        return value

    @property
    def poll_interval(self) -> timedelta:
        """RETRY_POLL_INTERVAL_MS as a duration."""
        return timedelta(milliseconds=self.retry_poll_interval_ms)

    @property
    def retention(self) -> timedelta:
        """RETENTION_DAYS as a duration."""
        return timedelta(days=self.retention_days)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from `load_settings` only, which has read the environment it was given."""
        return (init_settings,)


def load_settings(environment: Mapping[str, str]) -> Settings:
    """Return the checked settings.

    environment: normally os.environ. An empty value counts as unset, and so does the empty file of a
    secret that is set itself; of one that is not, it means an empty secret, never the default.
    Raises BadSettings with one line for every wrong setting, each beginning with its name; a
    secret's value never stands in it.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    wrong: set[str] = set()
    for name in Settings.model_fields:
        given = environment.get(name.upper())
        if given and _holds_surrogates(given):
            problems.append(f"{name.upper()}: is not UTF-8")
            wrong.add(name)
        elif given:
            values[name] = given
    for name in SECRETS:
        path = environment.get(f"{name}_FILE")
        if not path:
            continue
        try:
            secret = Path(path).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{name}_FILE: cannot read {path}: {getattr(error, 'strerror', None) or error}")
            continue
        if secret and environment.get(name):
            problems.append(f"{name}_FILE: {name} is set as well; set one of the two")
        elif not environment.get(name):
            values[name.lower()] = secret
    settings, mistakes = _settings_of(values)
    problems += mistakes.values()
    wrong |= mistakes.keys()
    problems += [problem for names, problem in _disagreements(settings) if not wrong & names]
    authorities = environment.get("SSL_CERT_FILE")
    # A broker's address that is wrong elsewhere asks for TLS as well.
    tls = settings.postgres_ssl or str(values.get("rabbitmq_url", "")).lower().startswith("amqps:")
    if authorities and tls and (problem := problem_with_authorities(authorities)):
        problems.append(f"SSL_CERT_FILE: {problem}")
    if problems:
        raise BadSettings(problems)
    return settings


def _settings_of(values: Mapping[str, Any]) -> tuple[Settings, dict[str, str]]:
    """Return settings made of the values that are right, and by name what is wrong with the others."""
    try:
        return Settings(**values), {}
    except ValidationError as error:
        mistakes = {str(mistake["loc"][0]): _line(mistake) for mistake in error.errors()}
    return Settings(**{name: value for name, value in values.items() if name not in mistakes}), mistakes


def _disagreements(settings: Settings) -> Iterator[tuple[set[str], str]]:
    """Yield what is right one by one and wrong together: the names of the settings, and what to say."""
    least, most = settings.postgres_pool_min, settings.postgres_pool_max
    # A maximum below the default minimum takes the minimum with it; only a chosen minimum can be wrong.
    if "postgres_pool_min" in settings.model_fields_set and least > most:
        yield (
            {"postgres_pool_min", "postgres_pool_max"},
            f"POSTGRES_POOL_MIN: {least} is above POSTGRES_POOL_MAX, {most}",
        )
    if settings.retry_queue == settings.manual_review_queue:
        yield {"retry_queue", "manual_review_queue"}, "RETRY_QUEUE: is the same queue as MANUAL_REVIEW_QUEUE"
    if settings.http_port == settings.metrics_port:
        yield {"http_port", "metrics_port"}, "HTTP_PORT: is the same port as METRICS_PORT"


def _holds_surrogates(text: str) -> bool:
    """Whether Python was given bytes that it could not decode: they would fail only where they are used."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _line(mistake: Any) -> str:
    name = str(mistake["loc"][0]).upper()
    shown = "" if name in _NEVER_SHOWN else f", got {mistake['input']!r}"
    return f"{name}: {mistake.get('ctx', {}).get('error') or mistake['msg']}{shown}"
