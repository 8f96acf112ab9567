"""Redaction: nothing secret is shown, in whatever text leaves the process; `***` stands in its place.

Three lines of defence: `redact` knows the structure of a URL, `scrub` finds credentials in any text, and what was
given to `hide` is found there in every form, also in a traceback of a library.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Final
from urllib.parse import SplitResult, quote, quote_plus, unquote, unquote_plus, urlsplit

from broadcaster.core.bounded import BoundedDict

HIDDEN: Final = "***"

PERCENT_ENCODE: Final = "percent-encode the password (%40 for @, %23 for #, %2F for /, %3F for ?, %25 for %)"

FILTERS: Final = frozenset({"channel", "type", "source", "severity", "since"})
"""Parameters in the URL of a hub."""

_FILES: Final = {"ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"}
_SHOWN: Final = FILTERS | _FILES | {"db", "ssl_cert_reqs", "ssl_check_hostname"}
_CREDENTIALS: Final = (
    "access_token|refresh_token|id_token|auth_token|token|password|passwd|pwd|ssl_password|username|user|"
    "api_key|apikey|key|secret|client_secret|auth|authorization|signature|sig|jwt|code"
)
_IS_CREDENTIAL: Final = re.compile(_CREDENTIALS, re.IGNORECASE).fullmatch

_URL: Final = re.compile(r"(?i)(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*:/{1,2})(\S*)@")  # a path has one slash left
_BETWEEN_URLS: Final = re.compile(r"(?i)\s*,\s*(?=(?:rediss?|unix)://)").split
_REDACTED: Final = re.compile(r"[^\s:@/]*:\*\*\*|\*\*\*").fullmatch
_PARAMETER: Final = re.compile(rf"(?i)([?&;](?:{_CREDENTIALS})=)[^&\s\"'<>]+")
_BEARER: Final = re.compile(r"(?i)\b((?:bearer|basic)[ .]+)[a-z0-9._~+/=-]{16,}")
_PRIVATE_KEY: Final = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.DOTALL)

_BROKEN_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})").search
_VISIBLE: Final = re.compile(r"[!-~]*").fullmatch

_SHORTEST: Final = 6
_WORD: Final = re.compile(r"[a-z]{1,11}|[A-Z]{1,11}|[0-9]{1,7}").fullmatch
"""Words and short numbers stand in many texts that have nothing to do with a password."""

_known: Final = BoundedDict[str, frozenset[str]](1024)
_longest_first: list[str] | None = None


def legal_token(token: str) -> str:
    """A token without the white space around it (a file ends with a newline); it is hidden from now on.

    Raises:
        ValueError: A header cannot carry it; the message shows nothing of it.
    """
    token = token.strip()
    hide(token)
    if not _VISIBLE(token):
        raise ValueError("has a character that no header can carry: only ASCII, and no white space, inside of it")
    return token


def split_url(url: str) -> SplitResult:
    """The parts of a URL, if it is certain where its password ends.

    Raises:
        ValueError: It is not, or the port is none; the message shows nothing of the URL.
    """
    if any(character.isspace() or not character.isprintable() for character in url):
        raise ValueError(f"has white space or a control character: {PERCENT_ENCODE}")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(f"cannot be parsed: {PERCENT_ENCODE}") from None
    has_user = "@" in parts.netloc
    strays = [parts.fragment, *_values_of_others(parts.query, all_of_them=has_user)]
    if parts.netloc:  # unix:///run/redis@1.sock has none
        strays.append(parts.path)
    if any("@" in text for text in strays):
        raise ValueError(f"has an @ after its host: {PERCENT_ENCODE}")
    if _BROKEN_ESCAPE(parts.netloc.rpartition("@")[0]):
        raise ValueError(f"has a % that begins no escape: {PERCENT_ENCODE}")
    try:
        if parts.port == 0:
            raise ValueError
    except ValueError:
        raise ValueError(f"has no valid port (if that is a part of the password: {PERCENT_ENCODE})") from None
    return parts


def _values_of_others(query: str, *, all_of_them: bool) -> list[str]:
    """The parameters that an @ must not stand in: a filter may have one, unless there is a user's name."""
    pairs = query.split("&")
    return pairs if all_of_them else [pair for pair in pairs if pair.partition("=")[0] not in FILTERS]


def split_urls(urls: str) -> list[str]:
    """The Redis URLs in a list with commas between them; a comma within one is followed by no scheme."""
    return _BETWEEN_URLS(urls)


def redact(url: str) -> str:
    """The URL without passwords and tokens, for logs and archives; of one that is ambiguous only the scheme.

    Of several (`split_urls`) each one.
    """
    if len(urls := split_urls(url)) > 1:
        return ",".join(map(redact, urls))
    scheme, mark, _ = url.partition("://")
    if not mark:
        return HIDDEN
    try:
        parts = split_url(url)
    except ValueError:
        return f"{scheme}{mark}{HIDDEN}" if scheme.isalpha() else HIDDEN
    user, at, address = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    shown = f"{name}:{HIDDEN}" if password else HIDDEN  # a name alone may be a token
    query = "?" + "&".join(_shown_parameter(pair) for pair in parts.query.split("&")) if parts.query else ""
    fragment = f"#{HIDDEN}" if parts.fragment else ""
    return f"{scheme}{mark}{shown if user else ''}{at}{address}{parts.path}{query}{fragment}"


def _shown_parameter(pair: str) -> str:
    name, is_set, value = pair.partition("=")
    if name in _SHOWN:
        return pair
    return f"{name}{is_set}{HIDDEN if value else ''}" if _IS_CREDENTIAL(name) else HIDDEN


def scrub(text: str) -> str:
    """A text without the credentials in it: of URLs, of headers, and whatever was given to `hide`."""
    global _longest_first
    if ":/" in text:
        text = _URL.sub(lambda found: found[0] if _REDACTED(found[2]) else f"{found[1]}{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    text = _PRIVATE_KEY.sub(rf"\1{HIDDEN}", text)
    if _longest_first is None:
        _longest_first = sorted({form for forms in _known.values() for form in forms}, key=len, reverse=True)
    for form in _longest_first:  # one by one: much faster than a pattern of as many branches
        if form in text:
            text = text.replace(form, HIDDEN)
    return text


def hide(secret: str) -> None:
    """From now on `scrub` finds this secret, in whatever form; a short word would be found where it is none."""
    global _longest_first
    if secret not in _known:
        forms = (form.strip() for form in _forms(secret))
        if long := frozenset(form for form in forms if len(form) >= _SHORTEST and not _WORD(form)):
            _known[secret] = long
            _longest_first = None


def hide_url(url: str) -> None:
    """`hide` the credentials of a URL, or of several, also of one that cannot be parsed."""
    if len(urls := split_urls(url)) > 1:
        for each in urls:
            hide_url(each)
        return
    rest = url.partition("://")[2] or url
    user, at, _ = rest.rpartition("@")
    if at:
        name, colon, password = user.partition(":")
        hide(password if colon else name)
        hide(base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode(errors="surrogatepass")).decode())
    for pair in rest.partition("?")[2].split("&"):
        name, _, value = pair.partition("=")
        if name not in _SHOWN:
            hide(value)


def _forms(secret: str) -> Iterator[str]:
    """The ways in which a secret is written: in a URL, in JSON, in Python, in a header."""
    for text in {secret, secret.strip(), unquote(secret), unquote_plus(secret)}:
        yield from (text, text.lower(), repr(text)[1:-1], ascii(text)[1:-1], json.dumps(text)[1:-1])
        yield json.dumps(text, ensure_ascii=False)[1:-1]
        yield text.encode("ascii", "backslashreplace").decode()
        data = text.encode(errors="surrogatepass")
        yield from (quote(data, safe=safe) for safe in ("", "/", "!$&'()*+,;=:@/?"))
        yield from (quote_plus(data), quote(data, safe="").lower())
        for encoded in (base64.b64encode(data), base64.urlsafe_b64encode(data)):
            yield encoded.decode().rstrip("=")
        yield from (line for line in text.splitlines() if len(line) >= 20 and "-----" not in line)  # of a PEM
