"""Says in words what is wrong with the address of a server, before anybody is asked for it.

Pure: nothing is looked up. What is said never holds a piece of a URL, where a password may be.
"""

from ipaddress import IPv6Address
from urllib.parse import SplitResult, unquote, urlsplit

# AMQP carries the name of a virtual host as a short string.
_VHOST_MAX_BYTES = 255

_NO_PORT = "is not a URL: its port is not a number from 1 to 65535"


def problem_with_host(host: str) -> str | None:
    """Return why `host` can be no server's name or address, or None."""
    if not host.isprintable() or set(host) & set(" ,;/@"):
        return "is no host name: it holds what no name has"
    if ":" in host:
        try:
            IPv6Address(host)
        except ValueError:
            return "is no host name and no IPv6 address; a port has a place of its own"
    try:
        host.encode("idna")  # as the resolver does, which would raise this in the middle of the work
    except UnicodeError:
        return "is no host name: a part between two dots is empty, too long (over 63), or cannot be encoded"
    return None


def problem_with_amqp_url(url: str) -> str | None:
    """Return why `url` names no broker and no way to log in, or None."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "is not a URL"
    # An @ behind the host: what is taken for the host is a piece of the password, and would be looked
    # up in the DNS.
    at_most_one = "@" in parts.netloc
    if url.count("@") > at_most_one or not url.isascii() or not url.isprintable() or " " in url:
        return "must be percent-encoded where it is not plain letters and digits: @ is %40, / is %2F"
    if parts.scheme not in ("amqp", "amqps"):
        return "must begin with amqp:// or amqps://"
    if "?" in url or "#" in url:
        return "has options behind a ? or #, and there are none; in a password, ? is %3F and # is %23"
    return _problem_with_server(parts) or _problem_with_login(parts) or _problem_with_vhost(parts.path[1:])


def problem_with_http_url(url: str) -> str | None:
    """Return why `url` can be no collector's address, or None."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https"):
        return "must begin with http:// or https://"
    return _problem_with_server(parts)


def _problem_with_server(parts: SplitResult) -> str | None:
    if not parts.hostname:
        return "names no host"
    try:
        port = parts.port
    except ValueError:
        return _NO_PORT
    if port == 0:
        return _NO_PORT
    problem = problem_with_host(parts.hostname)
    return f"names a host that {problem}" if problem else None


def _problem_with_login(parts: SplitResult) -> str | None:
    if "@" in parts.netloc and not (parts.username and parts.password is not None):
        return "names a user without a password, or the reverse; an empty password is user:@"
    for text in (parts.username, parts.password):
        if text and (problem := _problem_with_encoding(text)):
            return problem
    return None


def _problem_with_vhost(encoded: str) -> str | None:
    if problem := _problem_with_encoding(encoded):
        return problem
    if "/" in encoded and "/" in unquote(encoded):
        return "has a / inside its virtual host; write it as %2F"
    if len(unquote(encoded).encode()) > _VHOST_MAX_BYTES:
        return f"names a virtual host of over {_VHOST_MAX_BYTES} bytes"
    return None


def _problem_with_encoding(text: str) -> str | None:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        return "is percent-encoded, but not from UTF-8"
    return "holds %00, which no name or password may" if "\0" in decoded else None
