"""ClipCap: the published tables, the ablations and captions in other languages."""
