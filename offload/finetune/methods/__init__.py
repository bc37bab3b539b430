"""The methods: forward only (`zo`), adapters (`lora`), all parameters (`full`)."""
