"""The PEFT tuner."""
