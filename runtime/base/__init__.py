"""The ground floor: errors, argument checks, memory and threads; it imports no other room."""
