"""The project's benchmark: the hub beside a C floor and a naive hub. See README.md here."""
