"""Any remote server that speaks OpenAI's HTTP API."""

__all__: list[str] = []
