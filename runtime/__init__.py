"""The API: load, Model, Session, Generation."""
