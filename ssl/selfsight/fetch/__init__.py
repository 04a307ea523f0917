"""Images from URL lists: fetched politely, into tar shards or live into a run."""
