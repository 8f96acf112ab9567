"""Origins and patterns of origins, as browsers and people write them."""

from __future__ import annotations

import pytest

from broadcaster.settings.origin import canonical_origin, canonical_pattern, is_own, matches

CANONICAL = {
    "https://wall.example": "https://wall.example",
    "HTTPS://Wall.Example": "https://wall.example",
    "https://wall.example:443": "https://wall.example",
    "https://wall.example:8443": "https://wall.example:8443",
    "http://wall.example:80": "http://wall.example",
    "http://wall.example:443": "http://wall.example:443",
    "ws://127.0.0.1:8765": "ws://127.0.0.1:8765",
    "wss://hub:443": "wss://hub",
    "https://bücher.example": "https://xn--bcher-kva.example",
    "https://xn--bcher-kva.example": "https://xn--bcher-kva.example",
    "http://[::1]:8765": "http://[::1]:8765",
    "app://desk": "app://desk",
    "chrome-extension://abcdef": "chrome-extension://abcdef",
    "file://": "file://",
    "null": "null",
    "localhost:8765": "localhost:8765",
}


@pytest.mark.parametrize(("text", "expected"), CANONICAL.items(), ids=CANONICAL.keys())
def test_an_origin_has_one_form(text: str, expected: str) -> None:
    assert canonical_origin(text) == expected
    assert canonical_origin(expected) == expected
    assert canonical_pattern(text) == expected


PATTERNS = {
    "https://wall.example/": "https://wall.example",
    " https://wall.example ": "https://wall.example",
    "https://*.Example.com": "https://*.example.com",
    "https://*.example.com:8443/": "https://*.example.com:8443",
    "*": "*",
}


@pytest.mark.parametrize(("text", "expected"), PATTERNS.items(), ids=PATTERNS.keys())
def test_a_pattern_has_one_form(text: str, expected: str) -> None:
    assert canonical_pattern(text) == expected
    assert canonical_pattern(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "/",
            "https://",
            "https:///",
            "://wall.example",
            "wall.example",
            "wall",
            "*.example.com",
            "https://*",
        ),
        *(
            "https://wall.example/app",
            "https://wall.example?a",
            "https://a@wall.example",
            "https://a.*.example.com",
        ),
        *(
            "https://wall.example:0x",
            "https://wall.example:99999",
            "https://a b",
            "https://a, https://b",
            "https://*a.b",
        ),
        *("https://..", "https://" + "x" * 64 + ".example", "9://a", "https://[::1", "https:wall.example"),
    ],
)
def test_what_can_never_match_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^'.*' (has|is) n"):
        canonical_pattern(text)


@pytest.mark.parametrize("text", ["*", "https://wall.example/", "https://*.example.com", " https://wall.example"])
def test_a_pattern_is_no_origin(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form|has no"):
        canonical_origin(text)


def test_a_star_stands_for_one_label() -> None:
    allowed = ("https://*.example.com", "http://wall.example:3000")
    for origin in ("https://a.example.com", "https://b-1.example.com", "http://wall.example:3000"):
        assert matches(origin, allowed), origin
    for origin in (
        *("https://example.com", "https://a.b.example.com", "http://a.example.com", "https://a.example.com:8443"),
        *("https://.example.com", "https://evil-example.com", "http://wall.example", "null", "file://"),
    ):
        assert not matches(origin, allowed), origin


OWN = [
    ("http://127.0.0.1:8765", "127.0.0.1:8765", True),
    ("https://127.0.0.1:8765", "127.0.0.1:8765", True),
    ("ws://127.0.0.1:8765", "127.0.0.1:8765", True),
    ("localhost:8765", "localhost:8765", True),
    ("localhost:8765", "LocalHost:8765", True),
    ("https://events.example", "events.example", True),
    ("https://events.example", "events.example:443", True),
    ("https://events.example", "events.example:80", False),
    ("http://[::1]:8765", "[::1]:8765", True),
    ("ftp://127.0.0.1:8765", "127.0.0.1:8765", False),
    ("file://", "127.0.0.1:8765", False),
    ("null", "127.0.0.1:8765", False),
    ("http://localhost:8765", "127.0.0.1:8765", False),
    ("http://127.0.0.1", "127.0.0.1:8765", False),
    ("http://hub", "hub@evil", False),
]


@pytest.mark.parametrize(("origin", "host", "expected"), OWN)
def test_the_hubs_own_site_is_the_one_that_was_asked(origin: str, host: str, expected: bool) -> None:
    assert is_own(canonical_origin(origin), host) is expected
