"""Write saved adapters in the formats of other programs: GGUF for llama.cpp and Ollama, folders for vLLM and SGLang,
and LoRAs made of other methods. Each export is verified against the model in PEFT before it is written.
"""
