"""Prophet behind other projects' interfaces."""
