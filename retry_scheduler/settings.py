"""Reads the settings from the environment, checks them all, and names every wrong one at once.

Read by `cli` alone and handed down; no other module looks at the environment.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

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
        SecretStr("amqp://guest:guest@localhost:5672/"), description="Broker; amqps:// for TLS"
    )
    rabbitmq_prefetch: Annotated[int, Field(ge=1, le=65535)] = Field(
        10, description="Most requests in hand and not yet stored; all of them must fit the memory"
    )
    retry_queue: QueueName = Field("retry.scheduled", description="Queue that requests come in on")
    manual_review_queue: QueueName = Field(
        "manual-review.pending", description="Queue of messages for people"
    )

    postgres_host: str = Field("localhost", min_length=1, description="Database server")
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
        description="How often the table is looked at for what is coming; once a second in any case",
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

    @field_validator("otel_exporter_otlp_endpoint")
    @classmethod
    def _be_an_http_url(cls, value: str | None) -> str | None:
        problem = _problem_of_http_url(value) if value is not None else None
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
        problem = _problem_of_amqp_url(value.get_secret_value())
        if problem:
            raise ValueError(problem)
        return value

    @model_validator(mode="after")
    def _agree_with_each_other(self) -> Self:
        problems = []
        # A maximum below the default minimum takes the minimum with it; only a chosen minimum can be wrong.
        chosen = "postgres_pool_min" in self.model_fields_set
        if chosen and self.postgres_pool_min > self.postgres_pool_max:
            problems.append(
                f"POSTGRES_POOL_MIN: {self.postgres_pool_min} is above POSTGRES_POOL_MAX, "
                f"{self.postgres_pool_max}"
            )
        if self.retry_queue == self.manual_review_queue:
            problems.append("RETRY_QUEUE: is the same queue as MANUAL_REVIEW_QUEUE")
        if self.http_port == self.metrics_port:
            problems.append("HTTP_PORT: is the same port as METRICS_PORT")
        if problems:
            raise _Disagreement(problems)
        return self

    @property
    def poll_interval(self) -> timedelta:
        """RETRY_POLL_INTERVAL_MS as a duration."""
        return timedelta(milliseconds=self.retry_poll_interval_ms)

    @property
    def retention(self) -> timedelta:
        """RETENTION_DAYS as a duration."""
        return timedelta(days=self.retention_days)

    @property
    def uses_tls(self) -> bool:
        """Whether one of the servers has to show a certificate."""
        return self.postgres_ssl or self.rabbitmq_url.get_secret_value().startswith("amqps:")

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


class _Disagreement(ValueError):
    """Settings that are right one by one and wrong together."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def load_settings(environment: Mapping[str, str]) -> Settings:
    """Return the checked settings.

    environment: normally os.environ. An empty value counts as unset, and so does the empty file of a
    secret that is set itself; of one that is not, it means an empty secret, never the default.
    Raises BadSettings with one line for every wrong setting, each beginning with its name; a
    secret's value never stands in it.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name in Settings.model_fields:
        given = environment.get(name.upper())
        if given and _holds_surrogates(given):
            problems.append(f"{name.upper()}: is not UTF-8")
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
    try:
        settings = Settings(**values)
    except ValidationError as error:
        problems += [line for mistake in error.errors() for line in _lines(mistake)]
        raise BadSettings(problems) from None  # the cause would show values, secrets among them
    authorities = environment.get("SSL_CERT_FILE")
    if authorities and settings.uses_tls and (problem := problem_with_authorities(authorities)):
        problems.append(f"SSL_CERT_FILE: {problem}")
    if problems:
        raise BadSettings(problems)
    return settings


def _holds_surrogates(text: str) -> bool:
    """Whether Python was given bytes that it could not decode: they would fail only where they are used."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _lines(mistake: Any) -> list[str]:
    cause = mistake.get("ctx", {}).get("error")
    if isinstance(cause, _Disagreement):
        return cause.problems
    name = str(mistake["loc"][0]).upper()
    shown = "" if name in _NEVER_SHOWN else f", got {mistake['input']!r}"
    return [f"{name}: {cause or mistake['msg']}{shown}"]


def _problem_of_amqp_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        # An @ behind the host: what is taken for the host is a piece of the password, and would be looked
        # up in the DNS.
        at_most_one = "@" in parts.netloc
        if url.count("@") > at_most_one or not url.isascii() or not url.isprintable() or " " in url:
            return "must be percent-encoded where it is not plain letters and digits: @ is %40, / is %2F"
        port = parts.port
    except ValueError:
        return "is not a URL: its port is not a number from 1 to 65535"
    if parts.scheme not in ("amqp", "amqps"):
        return "must begin with amqp:// or amqps://"
    if not parts.hostname:
        return "names no host"
    if port == 0:
        return "is not a URL: its port is not a number from 1 to 65535"
    if "/" in unquote(parts.path[1:]) and "/" in parts.path[1:]:
        return "has a / inside its virtual host; write it as %2F"
    return None


def _problem_of_http_url(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https"):
        return "must begin with http:// or https://"
    if not parts.hostname or port == 0:
        return "names no host, or no port that exists"
    return None
