"""Everything that trains, evaluates and records; only `engine.run` imports the networks."""
