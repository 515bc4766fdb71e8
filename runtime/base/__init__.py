"""The base package: errors, argument checks, memory and threads; it imports no other package."""
