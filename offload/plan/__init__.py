"""Plans: which bytes stay in memory, which are streamed, and how fast that will be."""
