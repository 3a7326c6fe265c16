"""The model's side: continuous batches over adapters, in step with the ledger."""
