"""One call, decided and computed."""
