"""The trainer's side: sources, engine clients, the fleet and its rounds."""
