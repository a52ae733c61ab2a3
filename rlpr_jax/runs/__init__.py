"""Services of a long run, whatever it trains: checkpoints, metrics, guards, storage."""
