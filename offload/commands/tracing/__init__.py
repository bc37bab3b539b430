"""Commands that record what a model does on a text, and learn from it: `trace record`, `predictor`, `batches`, `neurons`."""
