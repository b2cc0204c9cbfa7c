"""Which tokens an adapter acts on: everywhere, or from its invocation on."""
