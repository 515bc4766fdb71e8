"""What a device can do: processor, memory, storage, power and noise."""
