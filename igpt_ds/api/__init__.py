"""The public Python API: `igpt_ds.load`, `igpt_ds.open_features`, `igpt_ds.open_shards`. Imported when one of them is used."""
