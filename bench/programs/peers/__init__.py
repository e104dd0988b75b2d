"""The same programs through public routers and through ours."""
