"""Serving a model over HTTP in the form of OpenAI's API (docs/server.md); `scheduler` and `kept` know no HTTP."""
