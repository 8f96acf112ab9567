"""Tests of the hub against the text of RFC 6455."""
