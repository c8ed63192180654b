"""What adapters of stock inference engines share, whatever the engine: nothing here knows vLLM."""
