"""What a careless distribution registers."""

NOT_A_SPEC = {"name": "wrong"}
