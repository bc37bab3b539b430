"""Commands that record what a model does on a text and learn from it: `record`, `predictor`, `batches`, `neurons`."""
