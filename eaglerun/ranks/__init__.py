"""The ranks of an engine, which compute. Today one, in the engine's process."""
