"""Makes the TLS context for both servers, and says in words why a server's certificate is refused.

The server's certificate and name are always verified; there is no setting against it.
"""

import ssl

# What OpenSSL found wrong with a certificate: x509_vfy.h, "X509_V_ERR_...".
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)

# What a server that answers in plain text makes OpenSSL say.
_PLAIN_TEXT = ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")


def client_context() -> ssl.SSLContext:
    """Return a context that trusts whom OpenSSL does: the system's authorities, or those of SSL_CERT_FILE."""
    return ssl.create_default_context()


def problem_with_authorities(path: str) -> str | None:
    """Return why the file that SSL_CERT_FILE names is of no use, or None. OpenSSL itself would be silent."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return f"{path} holds no certificate in PEM form"
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"
    return None


def describe_tls_problem(error: ssl.SSLError) -> str:
    """Return one line that says what is wrong, and what to do where somebody has to."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {_problem_with_certificate(error)}"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "TLS: the server has closed the connection"
    if error.reason in _PLAIN_TEXT:
        return "TLS: the server does not speak TLS on this port; switch it on there, or use its other port"
    return f"TLS: {error.reason or type(error).__name__}"


def _problem_with_certificate(error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "the server's certificate has expired; renew it there"
    if code == _NOT_YET_VALID:
        return "the server's certificate is not valid yet; compare the clocks"
    if code in _UNKNOWN_AUTHORITY:
        return (
            "the authority that has signed the server's certificate is not known here;"
            " name a file with the authority's certificate in SSL_CERT_FILE"
        )
    if code in _OTHER_NAME:
        return (
            "the server's certificate is for another name;"
            " connect to a name that is in it, or renew it with this one"
        )
    return f"the server's certificate is refused: {error.verify_message}"
