"""Who runs next: what a step does, and what becomes of its result. No torch."""
