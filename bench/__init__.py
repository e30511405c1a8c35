"""Step time, memory and small costs of every method, next to the limit and to PEFT. See README.md."""
