"""crosscut in other libraries: Hugging Face transformers, PEFT and TRL.

Nothing here imports them before it is used.
"""
