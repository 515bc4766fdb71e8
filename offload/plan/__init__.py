"""Plans of which bytes are pinned in memory and which are streamed, and forecasts of the speed."""
